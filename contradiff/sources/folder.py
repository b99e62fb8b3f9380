"""Images that are files of their own: class folders, and Kaggle's download of ILSVRC.

Class folders: `train/<class>/*` and `val/<class>/*`. Kaggle: `ILSVRC/Data/CLS-LOC/train/<wnid>/*`,
and all of `.../val/*` in one folder, whose labels are in `LOC_val_solution.csv`.
"""

import csv
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contradiff.sources.listing import (
    EXTENSIONS,
    SPLITS,
    ImageFile,
    Listing,
    explain_unreadable,
    in_order,
    is_image_name,
    read_synsets,
)

KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC"
KAGGLE_LABELS = "LOC_val_solution.csv"
NUM_THREADS = 16
"""Folders listed at a time: a network file system answers each slowly, but many at once."""


def read_file(root: Path, file: ImageFile) -> bytes:
    """Read an image that is a file of its own; ValueError if that fails."""
    path = root / (file.stored or file.path)
    with explain_unreadable(path):
        return path.read_bytes()


def scan_folder(root: Path) -> Listing:
    """List `train/<class>/*` and `val/<class>/*`.

    Classes are the sorted folder names in train/, as in torchvision.

    Raises:
        ValueError: a folder is missing or cannot be read, a class has no image, or val/ has a class
            that train/ lacks.
    """
    class_ids = class_folders(root / "train")
    splits = {split: images_by_class(root, split, class_ids) for split in SPLITS}
    return Listing(class_ids, _names(root, class_ids), splits)


def scan_kaggle(root: Path) -> Listing:
    """List Kaggle's "ImageNet Object Localization Challenge" as its zip unpacks.

    Raises:
        ValueError: as `scan_folder`; or `LOC_val_solution.csv` is missing or does not fit the
            images.
    """
    class_ids = class_folders(root / KAGGLE_IMAGES / "train")
    table, folder = root / KAGGLE_LABELS, root / KAGGLE_IMAGES / "val"
    labels = _kaggle_labels(table, class_ids)
    train = images_by_class(root, "train", class_ids, below=f"{KAGGLE_IMAGES}/")
    val: list[ImageFile] = []
    for name, num_bytes in _images_in(folder):
        label = labels.pop(name.rpartition(".")[0], None)
        if label is None:
            raise ValueError(f"data.root: {table} has no line for {folder / name}")
        path, stored = f"val/{class_ids[label]}/{name}", f"{KAGGLE_IMAGES}/val/{name}"
        val.append(ImageFile(path, label, num_bytes, stored))
    if labels:
        raise ValueError(
            f"data.root: {table} names {len(labels)} images that {folder} lacks: "
            f"{', '.join(sorted(labels)[:5])}"
        )
    return Listing(class_ids, _names(root, class_ids), {"train": train, "val": in_order(val)})


def class_folders(folder: Path, *, key: str = "data.root") -> tuple[str, ...]:
    """Names of the folders in `folder`, sorted; `key` is the parameter that led there.

    Raises:
        ValueError: there is no such folder, it cannot be read, or it has no folders in it.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{key}: no folder {folder}; expected one with a folder of images for each class"
        )
    with explain_unreadable(folder, key=key), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise ValueError(f"{key}: {folder} has no class folders with images in them")
    return tuple(names)


def images_by_class(
    root: Path,
    split: str,
    class_ids: Sequence[str],
    *,
    below: str = "",
    may_be_empty: bool = False,
    key: str = "data.root",
) -> tuple[ImageFile, ...]:
    """List the images in `<below><split>/<class>/`, by class and name; several folders at a time.

    Raises:
        ValueError: a folder cannot be read, is no class in `class_ids`, or has no image and is not
            allowed to be empty.
    """
    folder = root / f"{below}{split}"
    if unknown := sorted(set(class_folders(folder, key=key)) - set(class_ids)):
        raise ValueError(f"{key}: {folder} has classes that train/ lacks: {unknown[:5]}")

    def list_class(class_id: str) -> list[tuple[str, int]]:
        return _images_in(folder / class_id, may_be_empty=may_be_empty, key=key)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return tuple(
            ImageFile(path, label, num_bytes, f"{below}{path}" if below else "")
            for label, images in enumerate(pool.map(list_class, class_ids))
            for name, num_bytes in images
            for path in (f"{split}/{class_ids[label]}/{name}",)
        )


def _images_in(
    folder: Path, *, may_be_empty: bool = False, key: str = "data.root"
) -> list[tuple[str, int]]:
    """Names and sizes, sorted."""
    found: list[tuple[str, int]] = []
    if folder.is_dir():
        with explain_unreadable(folder, key=key), os.scandir(folder) as entries:
            found = sorted((e.name, e.stat().st_size) for e in entries if is_image_name(e.name))
    if not found and not may_be_empty:
        raise ValueError(f"{key}: {folder} holds no images ({', '.join(sorted(EXTENSIONS))})")
    return found


def _names(root: Path, class_ids: Sequence[str]) -> tuple[str, ...]:
    names = read_synsets(root)
    return tuple(names.get(class_id, class_id) for class_id in class_ids)


def _kaggle_labels(path: Path, class_ids: Sequence[str]) -> dict[str, int]:
    """Labels by image name. A line is `ILSVRC2012_val_00048981,n03995372 85 1 499 272 `."""
    if not path.is_file():
        raise ValueError(
            f"data.root: no {path}, which holds the labels of Kaggle's validation images"
        )
    index = {class_id: label for label, class_id in enumerate(class_ids)}
    labels: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 and row[:1] == ["ImageId"]:
                continue
            image, boxes = row if len(row) == 2 else ("", "")
            class_id = boxes.partition(" ")[0]
            if not class_id:
                fault = f"is not `image,class box ...`: {','.join(row)[:60]!r}"
            elif class_id not in index:
                fault = f"names the class {class_id}, which train/ lacks"
            elif image in labels:
                fault = f"names {image} a second time"
            else:
                labels[image] = index[class_id]
                continue
            raise ValueError(f"data.root: {path}: line {number} {fault}")
    return labels
