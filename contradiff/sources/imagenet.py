"""List the raw images in any supported layout, and describe them in a file for DVC: the manifest.

Class folders, ILSVRC's archives, Kaggle's download and Hugging Face's parquet shards give the same
images with the same labels. The manifest, a JSON file, contains a digest of the names and sizes of
all images and the bytes of some images. Hashing the bytes of all images would take too long.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from contradiff.data.params import Layout
from contradiff.files import explain_damage, read_json
from contradiff.sources import archive, parquet
from contradiff.sources.folder import KAGGLE_IMAGES, read_file, scan_folder, scan_kaggle
from contradiff.sources.listing import Listing, Read, describe_ignored

NUM_SAMPLED_HASHES = 200
PREPARE = "run `dvc repro prepare`"
MARKS: Mapping[Layout, tuple[str, ...]] = {
    "imagefolder": ("train/*/",),
    "archives": (archive.TRAIN_ARCHIVE, archive.VAL_ARCHIVE),
    "kaggle": (f"{KAGGLE_IMAGES}/train/",),
    "parquet": tuple(pattern.format("train") for pattern in parquet.PATTERNS),
}
"""Layout => files or folders that are typical of the layout. One of them is enough."""


@dataclass(frozen=True)
class RawImages:
    """The raw images of one data set. `read` returns an image's original bytes, in any process.

    `digest` changes if an image is added, removed, renamed or gets another size, and probably if
    many images get other pixels. Class folders, archives and Kaggle's download have equal digests.

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

    def describe(self) -> Iterator[str]:
        """Yield a log line for each split."""
        classes = len(self.listing.class_ids)
        for split, files in self.listing.splits.items():
            ignored = describe_ignored(self.listing.ignored.get(split, {}))
            yield f"{len(files)} {split} images of {classes} classes in {self.root}{ignored}"

    def manifest(self, *, project: Path) -> dict[str, Any]:
        """Return the content of the manifest. `project` is the project's folder."""
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
    """List the images below `root`. `scan_archives` explains `index_folder` and `verify`.

    With `layout="auto"`, `root` must contain files of exactly one layout (`MARKS`). Raises
    ValueError if this is not so, or if data are missing, damaged or contradictory.
    """
    if layout == "auto":
        layout = _detect(root)
        on_message(f"data.source: auto is {layout!r} ({' or '.join(MARKS[layout])}) in {root}")
    if verify and layout != "archives":
        fault = f"true checks the md5 of ILSVRC's archives, but {root} is read as {layout}"
        raise ValueError(f"raw.verify: {fault}; set raw.verify to false")
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
    """List the images that a manifest file describes. Raises ValueError if images have changed."""
    content = read_json(manifest, remedy=PREPARE)
    with explain_damage(manifest, remedy=PREPARE):
        root, digest = project / content["root"], str(content["digest"])
        layout: Layout | None = next((n for n in MARKS if n == content["layout"]), None)
        if layout is None:
            raise ValueError(f"layout: {content['layout']!r} is none of {', '.join(MARKS)}")
    images = scan_images(root, layout=layout, **options)
    if images.digest != digest:
        fault = f"{images.root} has changed since {manifest} was written"
        raise ValueError(f"data.root: {fault}; run `dvc repro -f prepare`")
    return images


def relative_to_project(path: Path, *, project: Path) -> str:
    """Return `path` relative to the folder `project`, or unchanged if it is not below `project`."""
    return str(path.relative_to(project) if path.is_relative_to(project) else path)


def _detect(root: Path) -> Layout:
    found: list[Layout] = [
        layout for layout, marks in MARKS.items() if any(any(root.glob(mark)) for mark in marks)
    ]
    if len(found) == 1:
        return found[0]
    text = "; ".join(f"{layout}: {' or '.join(MARKS[layout])}" for layout in (found or MARKS))
    fault = f"found no images in {root}; put one layout there: {text} (nothing is downloaded)"
    if found:
        fault = f"{root} contains {len(found)} layouts ({text}); set data.source to one of them"
    raise ValueError(f"data.root: {fault}")
