"""ImageNet as people have it, and what stands for it in DVC.

A tree of class folders, ILSVRC's archives, Kaggle's download or Hugging Face's parquet shards: each
source lists the same images with the same labels. The raw data are never hashed file by file: a
manifest of names, sizes and sampled contents stands for them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contradiff.data.params import Layout
from contradiff.files import replace_file
from contradiff.sources.archive import (
    TRAIN_ARCHIVE,
    VAL_ARCHIVE,
    ArchiveReader,
    scan_archives,
    verify_archives,
)
from contradiff.sources.folder import KAGGLE_IMAGES, FileReader, scan_folder, scan_kaggle
from contradiff.sources.listing import ImageFile, Listing, Read, check_listing
from contradiff.sources.parquet import parquet_files, scan_parquet
from contradiff.sources.parquet_reader import ParquetReader

NUM_SAMPLED_HASHES = 200
LOOKED_FOR: Mapping[Layout, str] = {
    "imagefolder": "train/<class>/",
    "archives": f"{TRAIN_ARCHIVE} or {VAL_ARCHIVE}",
    "kaggle": f"{KAGGLE_IMAGES}/train/",
    "parquet": "data/train-*.parquet",
}
"""What shows that a layout is there."""


@dataclass(frozen=True)
class Manifest:
    """What stands for raw images in DVC: every name and size, and sampled contents' hashes.

    Attributes:
        root: where they are, as the parameters name it.
        layout: how they are stored.
        class_ids: sorted; a label is an index into them.
        class_names: one a class.
        splits: the images of `train` and `val`.
        digest: changes when an image is added, removed, renamed or has another size, and most
            likely when many contents change. It is the same for a tree, archives and Kaggle's
            layout of the same images.
    """

    root: str
    layout: Layout
    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[ImageFile, ...]]
    digest: str

    @classmethod
    def scan(
        cls,
        root: Path,
        *,
        shown_root: str,
        layout: Layout | Literal["auto"] = "imagefolder",
        cache: Path | None = None,
        verify: bool = False,
        on_message: Callable[[str], None] = lambda _: None,
    ) -> "Manifest":
        """List the images.

        Args:
            root: where they are.
            shown_root: how the parameters name it; kept in the manifest.
            layout: how they are stored; auto: as it is found.
            cache: a folder that keeps the index of archives between runs.
            verify: compare the archives' md5 with ILSVRC's first.
            on_message: told what was found, and what takes long.

        Raises:
            ValueError: no layout or several are found, or what each source names: missing, empty,
                damaged or contradicting data; two images with one key.
        """
        if layout == "auto":
            layout = _detect(root, shown_root=shown_root)
            on_message(f"data.source auto: found {layout} ({LOOKED_FOR[layout]}) in {shown_root}")
        if verify and layout != "archives":
            raise ValueError(
                f"raw.verify: true compares the md5 of ILSVRC's archives, but {shown_root} is read "
                f"as {layout}; set it to false"
            )
        if verify:
            verify_archives(root, shown_root=shown_root, on_message=on_message)
        match layout:
            case "imagefolder":
                listing = scan_folder(root, shown_root=shown_root)
            case "kaggle":
                listing = scan_kaggle(root, shown_root=shown_root)
            case "parquet":
                listing = scan_parquet(root, shown_root=shown_root)
            case "archives":
                # one folder of indices for each place, so that two sets do not oust each other
                place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
                listing = scan_archives(
                    root,
                    shown_root=shown_root,
                    cache=None if cache is None else cache / place,
                    on_message=on_message,
                )
        check_listing(listing, shown_root=shown_root)
        digest = _digest(listing, _reader(layout, root))
        return cls(
            shown_root, layout, listing.class_ids, listing.class_names, listing.splits, digest
        )

    def reader(self, root: Path) -> Read:
        """Return what reads an image's original bytes.

        It may be pickled: worker processes open files for themselves.

        Args:
            root: where the images are now.
        """
        return _reader(self.layout, root)

    def write(self, path: Path) -> None:
        """Write as JSON: facts, then one line a split's counts. Paths are not repeated in it."""
        content = {
            "root": self.root,
            "layout": self.layout,
            "digest": self.digest,
            "num_images": {split: len(files) for split, files in self.splits.items()},
            "classes": dict(zip(self.class_ids, self.class_names, strict=True)),
        }
        with replace_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def _detect(root: Path, *, shown_root: str) -> Layout:
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
        f"data.root: {shown_root} holds {len(found)} layouts ({text}); set data.source to one"
        if found
        else f"data.root: found no images in {shown_root}; looked for {text} "
        "(data.source: auto; nothing is downloaded)"
    )


def _reader(layout: Layout, root: Path) -> Read:
    match layout:
        case "imagefolder" | "kaggle":
            return FileReader(root)
        case "archives":
            return ArchiveReader(root)
        case "parquet":
            return ParquetReader(root)


def _digest(listing: Listing, read: Read) -> str:
    hasher = hashlib.sha256(listing.facts.encode())
    for files in listing.splits.values():
        for file in files:
            line = f"{file.path}\t{file.num_bytes}\n"
            hasher.update(line.encode(errors="surrogateescape"))
        for file in files[:: max(1, len(files) // NUM_SAMPLED_HASHES)]:
            hasher.update(read(file))
    return hasher.hexdigest()
