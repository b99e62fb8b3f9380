"""Raw images as people have them, and the manifest that stands for them in DVC.

Class folders, ILSVRC's archives, Kaggle's download or Hugging Face's parquet shards: each source
lists the same images with the same labels. DVC never hashes the raw data file by file: a digest of
all names and sizes and of sampled contents stands for them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from contradiff.data.params import Layout
from contradiff.sources.archive import (
    TRAIN_ARCHIVE,
    VAL_ARCHIVE,
    ArchiveReader,
    scan_archives,
    verify_archives,
)
from contradiff.sources.folder import KAGGLE_IMAGES, read_file, scan_folder, scan_kaggle
from contradiff.sources.listing import Listing, Read
from contradiff.sources.parquet import parquet_files, read_row, scan_parquet

NUM_SAMPLED_HASHES = 200
LOOKED_FOR: Mapping[Layout, str] = {
    "imagefolder": "train/<class>/",
    "archives": f"{TRAIN_ARCHIVE} or {VAL_ARCHIVE}",
    "kaggle": f"{KAGGLE_IMAGES}/train/",
    "parquet": "data/train-*.parquet",
}
"""What shows that a layout is there."""


@dataclass(frozen=True)
class RawImages:
    """Raw images where they lie.

    Attributes:
        root: the folder that holds them.
        layout: how they are stored.
        listing: the images of `train` and `val`, and their classes.
        read: returns an image's original bytes; worker processes may use it too.
        digest: changes when an image is added, removed, renamed or has another size, and most
            likely when many contents change. The same images have one digest as class folders, as
            archives and as Kaggle's download.

    Example:
        ```python
        images = scan_images(Path("data/raw/imagenet"), layout="auto")
        first = images.listing.splits["train"][0]
        content, label = images.read(first), first.label
        ```
    """

    root: Path
    layout: Layout
    listing: Listing
    read: Read
    digest: str

    def manifest(self, *, project: Path) -> dict[str, Any]:
        """What stands for the images in DVC, as JSON. `project` is the project's root."""
        listing = self.listing
        return {
            "root": relative_to_project(self.root, project=project),
            "layout": self.layout,
            "digest": self.digest,
            "num_images": {split: len(files) for split, files in listing.splits.items()},
            "classes": dict(zip(listing.class_ids, listing.class_names, strict=True)),
        }

    def describe(self) -> Iterator[str]:
        """Yield a line for each split."""
        number = len(self.listing.class_ids)
        for split, files in self.listing.splits.items():
            yield f"{len(files)} {split} images of {number} classes in {self.root}"


def scan_images(
    root: Path,
    *,
    layout: Layout | Literal["auto"] = "imagefolder",
    cache: Path | None = None,
    verify: bool = False,
    on_message: Callable[[str], None] = lambda _: None,
) -> RawImages:
    """List the images.

    Args:
        root: the folder that holds them.
        layout: how they are stored; auto finds out.
        cache: a folder that keeps the index of archives between runs.
        verify: compare the archives' md5 with ILSVRC's first.
        on_message: told what was found, and what takes long.

    Raises:
        ValueError: there is no layout, or several; data are missing, empty, damaged or contradict
            each other; two images have one key.
    """
    if layout == "auto":
        layout = _detect(root)
        on_message(f"data.source auto: found {layout} ({LOOKED_FOR[layout]}) in {root}")
    if verify and layout != "archives":
        raise ValueError(
            f"raw.verify: true compares the md5 of ILSVRC's archives, but {root} is read as "
            f"{layout}; set it to false"
        )
    if verify:
        verify_archives(root, on_message=on_message)
    match layout:
        case "imagefolder":
            listing, read = scan_folder(root), partial(read_file, root)
        case "kaggle":
            listing, read = scan_kaggle(root), partial(read_file, root)
        case "parquet":
            listing, read = scan_parquet(root), partial(read_row, root)
        case "archives":
            listing = scan_archives(root, cache=cache, on_message=on_message)
            read = ArchiveReader(root)
    listing.check(root)
    return RawImages(root, layout, listing, read, _digest(listing, read))


def reopen_images(
    manifest: Path,
    *,
    project: Path,
    cache: Path | None = None,
    on_message: Callable[[str], None] = lambda _: None,
) -> RawImages:
    """List the images that a manifest stands for, with the arguments of `scan_images`.

    Raises:
        ValueError: the manifest is missing, or the images have changed since; else as
            `scan_images`.
    """
    content = read_manifest(manifest)
    root = project / content["root"]
    images = scan_images(root, layout=content["layout"], cache=cache, on_message=on_message)
    if images.digest != content["digest"]:
        raise ValueError(
            f"data.root: {root} has changed since {manifest}; run `dvc repro -f prepare`"
        )
    return images


def check_batch_sizes(batch_sizes: Mapping[str, int], images: RawImages) -> None:
    """Refuse batches, by the parameter's dotted key, of more images than there are.

    Raises:
        ValueError: names all parameters that are too large, one on a line.
    """
    num_train = len(images.listing.splits["train"])
    faults = [
        f"{key}: {size} is more than the {num_train} training images in {images.root}; lower it"
        for key, size in batch_sizes.items()
        if size > num_train
    ]
    if faults:
        raise ValueError("\n".join(faults))


def relative_to_project(path: Path, *, project: Path) -> str:
    """How a manifest names a folder: relative to the project's root, if it lies below it."""
    return str(path.relative_to(project) if path.is_relative_to(project) else path)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest that the stage `prepare` has written.

    Raises:
        ValueError: the file is missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing; run `dvc repro prepare`")
    return json.loads(path.read_text(encoding="utf-8"))


def _detect(root: Path) -> Layout:
    train = root / "train"
    marks: dict[Layout, bool] = {
        "imagefolder": train.is_dir() and any(path.is_dir() for path in train.iterdir()),
        "archives": any((root / name).is_file() for name in (TRAIN_ARCHIVE, VAL_ARCHIVE)),
        "kaggle": (root / KAGGLE_IMAGES / "train").is_dir(),
        "parquet": bool(parquet_files(root, "train")),
    }
    found: list[Layout] = [layout for layout, is_there in marks.items() if is_there]
    if len(found) == 1:
        return found[0]
    listed: list[Layout] = found or list(marks)
    text = "; ".join(f"{layout}: {LOOKED_FOR[layout]}" for layout in listed)
    raise ValueError(
        f"data.root: {root} holds {len(found)} layouts ({text}); set data.source to one"
        if found
        else f"data.root: found no images in {root}; looked for {text} "
        "(data.source: auto; nothing is downloaded)"
    )


def _digest(listing: Listing, read: Read) -> str:
    hasher = hashlib.sha256(listing.containers.encode())
    for files in listing.splits.values():
        for file in files:
            line = f"{file.path}\t{file.num_bytes}\n"
            hasher.update(line.encode(errors="surrogateescape"))
        for file in files[:: max(1, len(files) // NUM_SAMPLED_HASHES)]:
            hasher.update(read(file))
    return hasher.hexdigest()
