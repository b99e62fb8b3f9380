"""Raw images as people have them, and the manifest that stands for them in DVC.

Class folders, ILSVRC's archives, Kaggle's download or Hugging Face's parquet shards: each source
lists the same images with the same labels. DVC never hashes the raw data file by file: a digest of
all names and sizes and of sampled contents stands for them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from contradiff.data.params import Layout
from contradiff.sources import archive, parquet
from contradiff.sources.folder import KAGGLE_IMAGES, read_file, scan_folder, scan_kaggle
from contradiff.sources.listing import Listing, Read

NUM_SAMPLED_HASHES = 200
MARKS: Mapping[Layout, tuple[str, ...]] = {
    "imagefolder": ("train/*/",),
    "archives": (archive.TRAIN_ARCHIVE, archive.VAL_ARCHIVE),
    "kaggle": (f"{KAGGLE_IMAGES}/train/",),
    "parquet": tuple(pattern.format("train") for pattern in parquet.PATTERNS),
}
"""One of these files or folders shows that a layout is there."""


@dataclass(frozen=True)
class RawImages:
    """Raw images where they lie. `read` returns an image's original bytes, in any process.

    The digest changes when an image is added, removed, renamed or has another size, and most likely
    when many contents change. It is the same for class folders, archives and Kaggle's download.

    Example:
        ```python
        images = scan_images(Path("data/raw/imagenet"), layout="auto")
        content = images.read(images.listing.splits["train"][0])
        ```
    """

    root: Path
    layout: Layout
    listing: Listing
    read: Read
    digest: str

    def manifest(self, *, project: Path) -> dict[str, Any]:
        """Return what stands for the images in DVC, as JSON. `project` is the project's root."""
        listing = self.listing
        return {
            "root": relative_to_project(self.root, project=project),
            "layout": self.layout,
            "digest": self.digest,
            "num_images": {split: len(files) for split, files in listing.splits.items()},
            "classes": dict(zip(listing.class_ids, listing.class_names, strict=True)),
        }


def scan_images(
    root: Path,
    *,
    layout: Layout | Literal["auto"] = "imagefolder",
    index_folder: Path | None = None,
    verify: bool = False,
    on_message: Callable[[str], None] = lambda _: None,
) -> RawImages:
    """List the images. `scan_archives` explains `index_folder` and `verify`.

    It raises ValueError if there is no layout, or several; if data are missing, empty, damaged or
    contradict each other; if two images have one key.
    """
    if layout == "auto":
        layout = _detect(root)
        on_message(f"data.source auto: found {layout} ({' or '.join(MARKS[layout])}) in {root}")
    if verify and layout != "archives":
        fault = f"compares the md5 of ILSVRC's archives, but {root} is read as {layout}"
        raise ValueError(f"raw.verify: true {fault}; set it to false")
    read: Read = partial(read_file, root)
    match layout:
        case "imagefolder":
            listing = scan_folder(root)
        case "kaggle":
            listing, read = scan_kaggle(root), partial(read_file, root / KAGGLE_IMAGES)
        case "parquet":
            listing, read = parquet.scan_parquet(root), partial(parquet.read_row, root)
        case "archives":
            read = partial(archive.read_member, root)
            listing = archive.scan_archives(
                root, index_folder=index_folder, verify=verify, on_message=on_message
            )
    listing.check(root)
    hasher = hashlib.sha256(listing.containers.encode())
    for files in listing.splits.values():
        for file in files:
            hasher.update(f"{file.path}\t{file.num_bytes}\n".encode(errors="surrogateescape"))
        for file in files[:: max(1, len(files) // NUM_SAMPLED_HASHES)]:
            hasher.update(read(file))
    return RawImages(root, layout, listing, read, hasher.hexdigest())


def reopen_images(manifest: Path, *, project: Path, **options: Any) -> RawImages:
    """Scan a manifest's images again; ValueError if it is missing or they have changed since."""
    content = read_manifest(manifest)
    images = scan_images(project / content["root"], layout=content["layout"], **options)
    if images.digest != content["digest"]:
        fault = f"{images.root} has changed since {manifest}"
        raise ValueError(f"data.root: {fault}; run `dvc repro -f prepare`")
    return images


def relative_to_project(path: Path, *, project: Path) -> str:
    """How a manifest names a folder: relative to the project's root, if it lies below it."""
    return str(path.relative_to(project) if path.is_relative_to(project) else path)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest that the stage `prepare` has written; ValueError if it is missing."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; run `dvc repro prepare`")
    return json.loads(path.read_text(encoding="utf-8"))


def _detect(root: Path) -> Layout:
    found: list[Layout] = [
        layout for layout, marks in MARKS.items() if any(any(root.glob(mark)) for mark in marks)
    ]
    if len(found) == 1:
        return found[0]
    text = "; ".join(f"{layout}: {' or '.join(MARKS[layout])}" for layout in (found or MARKS))
    fault = f"found no images in {root}; looked for {text} (nothing is downloaded)"
    if found:
        fault = f"{root} holds {len(found)} layouts ({text}); set data.source to one"
    raise ValueError(f"data.root: {fault}")
