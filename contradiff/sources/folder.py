"""List images that are separate files: in class folders, or in Kaggle's download of ILSVRC.

Class folders are `train/<class>/` and `val/<class>/`. Images lie in them or in their sub-folders,
as in torchvision's ImageFolder. Hidden files and folders are ignored. Kaggle's download has only
the class folders in `train`. Its folder `val` contains all validation images, and a CSV file has
their labels. The folders `train` and `val` are in `ILSVRC/Data/CLS-LOC`.
"""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from contradiff.files import explain_damage
from contradiff.sources import listing
from contradiff.sources.listing import (
    ImageFile,
    Listing,
    collect,
    explain_unreadable,
    is_folder,
)

KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC"


def read_file(root: Path, file: ImageFile) -> bytes:
    """Read an image that is a separate file. Raises ValueError if this fails."""
    path = root / (file.stored or file.path)
    with explain_unreadable(path):
        return path.read_bytes()


def scan_folder(
    root: Path, *, test: str = "val", may_be_empty: bool = False, key: str = "data.root"
) -> Listing:
    """List `train/<class>/` and `<test>/<class>/`. The classes are the sorted folders in train/.

    `key` is the parameter that messages name. Raises ValueError if a folder is missing, if a class
    is only in <test>/, or if a class has no images. `may_be_empty` allows this in <test>/. The
    message has a line for each fault.
    """
    faults: list[str] = []
    class_ids, in_test = tuple[str, ...](), tuple[str, ...]()
    splits, ignored = dict[str, tuple[ImageFile, ...]](), dict[str, Counter[str]]()
    with explain_unreadable(root, key=key):
        with collect(faults):
            class_ids = _class_folders(root / "train", key)
            splits["train"], ignored["train"] = _by_class(root / "train", class_ids, key)
        with collect(faults):
            in_test = _class_folders(root / test, key)
        if class_ids and (unknown := sorted(set(in_test) - set(class_ids))):
            fault = f"{root / test} has classes that train/ lacks: {unknown[:5]}"
            faults.append(f"{key}: {fault}")
        if class_ids and in_test:
            with collect(faults):
                found = _by_class(root / test, class_ids, key, may_be_empty=may_be_empty)
                splits[test], ignored[test] = found
    if faults:
        raise ValueError("\n".join(faults))
    return Listing(class_ids, _names(root, class_ids), splits, ignored=ignored)


def scan_kaggle(root: Path) -> Listing:
    """List the images in the unpacked zip of Kaggle's "ImageNet Object Localization Challenge".

    The paths in the list are relative to `KAGGLE_IMAGES`. Raises ValueError as `scan_folder` does,
    or if `LOC_val_solution.csv` is missing or does not list exactly the validation images.
    """
    train, folder = root / KAGGLE_IMAGES / "train", root / KAGGLE_IMAGES / "val"
    table = root / "LOC_val_solution.csv"
    class_ids = _class_folders(train)
    labels = _kaggle_labels(table, class_ids)
    val: list[ImageFile] = []
    images, ignored = images_in(folder)
    for name, num_bytes in images:
        label = labels.pop(name.rpartition(".")[0], None)
        if label is None:
            raise ValueError(f"data.root: {table} has no line for {folder / name}")
        val.append(ImageFile(f"val/{class_ids[label]}/{name}", label, num_bytes, f"val/{name}"))
    if labels:
        fault = f"{len(labels)} images that are not in {folder}: {', '.join(sorted(labels)[:5])}"
        raise ValueError(f"data.root: {table} names {fault}")
    of_train, ignored_in_train = _by_class(train, class_ids)
    splits = {"train": of_train, "val": listing.in_order(val)}
    counts = {"train": ignored_in_train, "val": ignored}
    return Listing(class_ids, _names(root, class_ids), splits, ignored=counts)


def _class_folders(folder: Path, key: str = "data.root") -> tuple[str, ...]:
    if not is_folder(folder):
        expected = "it must contain a folder of images for each class"
        raise ValueError(f"{key}: no folder {folder}; {expected}")
    with explain_unreadable(folder, key=key), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise ValueError(f"{key}: {folder} has no class folders with images in them")
    return tuple(names)


def _by_class(
    folder: Path, class_ids: Sequence[str], key: str = "data.root", *, may_be_empty: bool = False
) -> tuple[tuple[ImageFile, ...], Counter[str]]:
    """List the images of all classes, in order; count what is ignored, by kind."""
    with explain_unreadable(folder, key=key), os.scandir(folder) as entries:
        ignored = Counter(
            "hidden" if entry.name[0] == "." else "outside the class folders"
            for entry in entries
            if entry.name[0] == "." or not entry.is_dir()
        )
    list_class = partial(images_in, key=key, may_be_empty=may_be_empty)
    files, faults = list[ImageFile](), list[str]()
    with ThreadPoolExecutor(listing.NUM_THREADS) as pool:
        waiting = [pool.submit(list_class, folder / class_id) for class_id in class_ids]
        for label, found in enumerate(waiting):
            place = f"{folder.name}/{class_ids[label]}"
            with collect(faults):
                images, ignored_in_class = found.result()
                files += [ImageFile(f"{place}/{name}", label, size) for name, size in images]
                ignored.update(ignored_in_class)
    if faults:
        more = [f"{key}: {len(faults) - 5} more class folders like these"] * (len(faults) > 5)
        raise ValueError("\n".join(faults[:5] + more))
    return tuple(files), ignored


def images_in(
    folder: Path, *, key: str = "data.root", may_be_empty: bool = False
) -> tuple[list[tuple[str, int]], Counter[str]]:
    """List the images in a folder and its sub-folders: names below `folder`, and sizes.

    Images are sorted by sub-folder, then by name, as in torchvision. Also count what is ignored.
    """
    found, ignored = list[tuple[str, str, int]](), Counter[str]()
    waiting = [folder] if is_folder(folder) else []
    while waiting:
        place = waiting.pop()
        inside = "" if place == folder else place.relative_to(folder).as_posix()
        with explain_unreadable(place, key=key), os.scandir(place) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    ignored["hidden"] += 1
                elif entry.is_dir():
                    sub_folder = Path(entry)
                    if place.resolve().is_relative_to(sub_folder.resolve()):
                        raise ValueError(f"{key}: {sub_folder} links to its own parent; remove it")
                    waiting.append(sub_folder)
                elif listing.is_image_name(entry.name):
                    found.append((inside, entry.name, entry.stat().st_size))
                else:
                    ignored[Path(entry).suffix.lower() or "without extension"] += 1
    if not found and not may_be_empty:
        kinds = ", ".join(sorted(listing.EXTENSIONS))
        fault = f"{folder} contains no images ({kinds}){listing.describe_ignored(ignored)}"
        raise ValueError(f"{key}: {fault}")
    files = [(f"{inside}/{name}".lstrip("/"), size) for inside, name, size in sorted(found)]
    return files, ignored


def _names(root: Path, class_ids: Sequence[str]) -> tuple[str, ...]:
    names = listing.read_synsets(root)
    return tuple(names.get(class_id, class_id) for class_id in class_ids)


def _kaggle_labels(path: Path, class_ids: Sequence[str]) -> dict[str, int]:
    """Return name => label. A line is `ILSVRC2012_val_00048981,n03995372 85 1 499 272 `."""
    if not path.is_file():
        purpose = "it contains the labels of Kaggle's validation images"
        raise ValueError(f"data.root: {path} is missing; {purpose}")
    label_of = {class_id: label for label, class_id in enumerate(class_ids)}
    labels: dict[str, int] = {}
    remedy = "fetch this file of data.root again"
    with (
        explain_damage(path, remedy=remedy),
        path.open(newline="", encoding="utf-8", errors="replace") as file,
    ):
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 and row[:1] == ["ImageId"]:
                continue
            image, boxes = row if len(row) == 2 else ("", "")
            class_id = boxes.partition(" ")[0]
            if not class_id:
                fault = f"does not have the form `image,class box ...`: {','.join(row)[:60]!r}"
            elif class_id not in label_of:
                fault = f"names the class {class_id}, which train/ lacks"
            elif image in labels:
                fault = f"names {image} a second time"
            else:
                labels[image] = label_of[class_id]
                continue
            raise ValueError(f"data.root: {path}: line {number} {fault}")
    return labels
