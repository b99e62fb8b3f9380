"""Images that are files: an ImageFolder tree, and Kaggle's download of ILSVRC.

ImageFolder: `train/<class>/*` and `val/<class>/*`. Kaggle: `ILSVRC/Data/CLS-LOC/train/<wnid>/*`
and `.../val/*` in one folder, whose labels are in `LOC_val_solution.csv`.
"""

import csv
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from contradiff.sources.listing import (
    EXTENSIONS,
    SPLITS,
    SYNSETS_NAME,
    ImageFile,
    Listing,
    is_image_name,
    read_synsets,
    unreadable,
)

KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC"
KAGGLE_LABELS = "LOC_val_solution.csv"
NUM_THREADS = 16
"""Folders listed at a time: network file systems answer each request late, but many at once."""


@dataclass(frozen=True)
class FileReader:
    """Reads images that are files of their own."""

    root: Path

    def __call__(self, file: ImageFile, /) -> bytes:
        """Read a file whole."""
        path = self.root / (file.stored or file.path)
        try:
            return path.read_bytes()
        except OSError as error:
            raise unreadable(error, shown=str(path)) from error


def scan_folder(root: Path, *, shown_root: str) -> Listing:
    """List `train/<class>/*` and `val/<class>/*`.

    Classes are the sorted folder names of train/, as in torchvision.

    Raises:
        ValueError: no such folder, one that cannot be read, no images, an empty class, or val
            classes that train lacks.
    """
    class_ids = _class_folders(root / "train", shown=f"{shown_root}/train")
    splits: dict[str, tuple[ImageFile, ...]] = {}
    for split in SPLITS:
        folders = _class_folders(root / split, shown=f"{shown_root}/{split}")
        unknown = sorted(set(folders) - set(class_ids))
        if unknown:
            raise ValueError(
                f"data.root: {shown_root}/{split} has classes that train/ lacks: {unknown[:5]}"
            )
        splits[split] = _by_class(root, split, class_ids, shown_root=shown_root, below="")
    return Listing(class_ids, _names(root, class_ids), splits)


def scan_kaggle(root: Path, *, shown_root: str) -> Listing:
    """List Kaggle's "ImageNet Object Localization Challenge" as its zip unpacks.

    Raises:
        ValueError: a folder or `LOC_val_solution.csv` is missing, or that table and the images do
            not belong together; else as `scan_folder`.
    """
    shown = f"{shown_root}/{KAGGLE_IMAGES}"
    class_ids = _class_folders(root / KAGGLE_IMAGES / "train", shown=f"{shown}/train")
    labels = _kaggle_labels(root / KAGGLE_LABELS, class_ids, shown=f"{shown_root}/{KAGGLE_LABELS}")
    train = _by_class(root, "train", class_ids, shown_root=shown_root, below=f"{KAGGLE_IMAGES}/")
    val: list[ImageFile] = []
    for name, num_bytes in _images(root / KAGGLE_IMAGES / "val", shown=f"{shown}/val"):
        stem = name.rpartition(".")[0]
        if stem not in labels:
            raise ValueError(
                f"data.root: {shown_root}/{KAGGLE_LABELS} has no line for {shown}/val/{name}"
            )
        label = labels.pop(stem)
        path = f"val/{class_ids[label]}/{name}"
        val.append(ImageFile(path, label, num_bytes, f"{KAGGLE_IMAGES}/val/{name}"))
    if labels:
        raise ValueError(
            f"data.root: {shown_root}/{KAGGLE_LABELS} names {len(labels)} images that {shown}/val "
            f"lacks: {', '.join(sorted(labels)[:5])}"
        )
    splits = {"train": train, "val": in_order(val)}
    return Listing(class_ids, _names(root, class_ids), splits)


def in_order(files: Sequence[ImageFile]) -> tuple[ImageFile, ...]:
    """Order by class, then by name, as a tree is listed."""
    return tuple(sorted(files, key=lambda file: (file.label, file.path)))


def _by_class(
    root: Path, split: str, class_ids: Sequence[str], *, shown_root: str, below: str
) -> tuple[ImageFile, ...]:
    """List the class folders of a split, several at a time."""

    def images_of(class_id: str) -> list[tuple[str, int]]:
        folder = f"{below}{split}/{class_id}"
        return _images(root / folder, shown=f"{shown_root}/{folder}")

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        listed = pool.map(images_of, class_ids)
        return tuple(
            ImageFile(path, label, num_bytes, f"{below}{path}" if below else "")
            for label, (class_id, names) in enumerate(zip(class_ids, listed, strict=True))
            for name, num_bytes in names
            for path in (f"{split}/{class_id}/{name}",)
        )


def _class_folders(root: Path, *, shown: str) -> tuple[str, ...]:
    if not root.is_dir():
        raise ValueError(
            f"data.root: no folder {shown}; expected one with a folder of images for each class"
        )
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise unreadable(error, shown=shown) from error
    if not names:
        raise ValueError(f"data.root: {shown} has no class folders with images in them")
    return tuple(names)


def _images(folder: Path, *, shown: str) -> list[tuple[str, int]]:
    """Names and sizes of a folder's images, sorted."""
    found: list[tuple[str, int]] = []
    if folder.is_dir():
        try:
            with os.scandir(folder) as entries:
                found = sorted((e.name, e.stat().st_size) for e in entries if is_image_name(e.name))
        except OSError as error:
            # one entry's error has its path, which is not that of the folder
            below = os.path.relpath(error.filename or folder, folder)
            raise unreadable(error, shown=shown if below == "." else f"{shown}/{below}") from error
    if not found:
        raise ValueError(f"data.root: {shown} holds no images ({', '.join(sorted(EXTENSIONS))})")
    return found


def _names(root: Path, class_ids: Sequence[str]) -> tuple[str, ...]:
    names = read_synsets(root / SYNSETS_NAME)
    return tuple(names.get(class_id, class_id) for class_id in class_ids)


def _kaggle_labels(path: Path, class_ids: Sequence[str], *, shown: str) -> dict[str, int]:
    """Labels by image name. A line is `ILSVRC2012_val_00048981,n03995372 85 1 499 272 `."""
    index = {class_id: label for label, class_id in enumerate(class_ids)}
    if not path.is_file():
        raise ValueError(
            f"data.root: no {shown}, which holds the labels of Kaggle's validation images"
        )
    labels: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 and row[:1] == ["ImageId"]:
                continue
            match [row[0], *row[1].split()] if len(row) == 2 else []:
                case [image, class_id, *_] if class_id in index and image not in labels:
                    labels[image] = index[class_id]
                case [image, class_id, *_] if class_id in index:
                    raise ValueError(
                        f"data.root: {shown}: line {number} names {image} a second time"
                    )
                case [_, class_id, *_]:
                    raise ValueError(
                        f"data.root: {shown}: line {number} names the class {class_id}, which "
                        "train/ lacks"
                    )
                case _:
                    raise ValueError(
                        f"data.root: {shown}: line {number} is not `image,class box ...`: "
                        f"{','.join(row)[:60]!r}"
                    )
    return labels
