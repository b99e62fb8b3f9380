"""ImageNet from Hugging Face: parquet files with columns `image` {bytes, path} and `label`.

A label in these files is the class's position in the sorted wnids (WordNet ids). If the images'
names contain wnids, the labels are checked. The images themselves are not read for the list.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from contradiff.files import explain_damage
from contradiff.sources.listing import ImageFile, Listing, first_name, in_order, read_synsets

PATTERNS = ("data/{}-*.parquet", "{}-*.parquet", "data/{}/*.parquet", "{}/*.parquet")
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val")}
NUM_CACHED_GROUPS = 4
"""Row groups kept in memory. All rows of a group (here 100 images, 11 MB) are read together."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_WNID = re.compile(r"n\d{8}")
_PREFIX, _SUFFIX = re.compile(r"(n\d{8})_"), re.compile(r"(.+)_(n\d{8})")


def read_row(root: Path, file: ImageFile) -> bytes:
    """Read one image. Raises ValueError if its file is missing or damaged or its row has no image.

    All images of its row group are read, unless they are in memory. So row order is fastest.
    """
    import pyarrow as pa

    path = root / file.stored
    try:
        shard, starts = _opened(path, os.getpid(), path.stat().st_mtime_ns)
        number = bisect_right(starts, file.offset) - 1
        image = _row_group(shard, number)[file.offset - starts[number]]
    except (pa.ArrowException, OSError, IndexError) as error:
        raise ValueError(f"data.root: {path}: row {file.offset} cannot be read: {error}") from error
    content = image["bytes"].as_py() if image.is_valid else None
    if not content:
        raise ValueError(f"data.root: {path}: row {file.offset} has no image bytes, only a path")
    return content


@cache
def _opened(path: Path, _process: int, _time: int) -> tuple[Any, list[int]]:
    """Open a file, once in each process, and find the first row of each row group."""
    from pyarrow import parquet

    shard = parquet.ParquetFile(path, memory_map=True)
    groups = range(shard.metadata.num_row_groups)
    lengths = (shard.metadata.row_group(number).num_rows for number in groups)
    return shard, [0, *accumulate(lengths)]


@lru_cache(NUM_CACHED_GROUPS)
def _row_group(shard: Any, number: int) -> Any:
    return shard.read_row_group(number, columns=["image.bytes"], use_threads=False)["image"]


def parquet_files(root: Path, split: str) -> list[Path]:
    """Return a split's files, such as `data/train-00000-of-00294.parquet`, sorted by name."""
    for name in SPLIT_NAMES[split]:
        for pattern in PATTERNS:
            if found := sorted(root.glob(pattern.format(name))):
                return found
    return []


def scan_parquet(root: Path) -> Listing:
    """List the images in parquet files.

    The ids of the classes are wnids, if the files or `LOC_synset_mapping.txt` contain the wnids. If
    not, the ids are labels in four digits. An image without a name of its own is named by its
    number. Raises ValueError if files are missing or damaged, or if columns or labels are not as
    expected.
    """
    images: dict[str, list[ImageFile]] = {}
    names: dict[str, list[str]] = {}
    containers = ""
    for split in SPLIT_NAMES:
        files = parquet_files(root, split)
        _check_complete(root, split, files)
        images[split] = []
        for path in files:
            with explain_damage(path, remedy="fetch this file of data.root again"):
                rows, found = _read_shard(root, path)
            if found != names.setdefault(split, found):
                fault = "has other class names than the earlier files"
                raise ValueError(f"data.root: {path} {fault}")
            images[split] += rows
            stored = path.relative_to(root).as_posix()
            containers += f"{stored}\t{path.stat().st_size}\t{_footer_digest(path)}\n"
    synsets = read_synsets(root)
    class_ids = _class_ids(root, images, names["train"], synsets)
    splits: dict[str, tuple[ImageFile, ...]] = {}
    for split, rows in images.items():
        times = Counter((image.label, image.path) for image in rows)
        unique = (i if times[i.label, i.path] == 1 else replace(i, path="") for i in rows)
        splits[split] = in_order(_named(split, *item, class_ids) for item in enumerate(unique))
    shown = [first_name(name) for name in names["train"]] or [synsets.get(i, i) for i in class_ids]
    return Listing(class_ids, tuple(shown), splits, containers)


def _check_complete(root: Path, split: str, files: Sequence[Path]) -> None:
    if not files:
        patterns = [p.format(name) for name in SPLIT_NAMES[split] for p in PATTERNS]
        raise ValueError(f"data.root: {root} has no {split} files, such as {', '.join(patterns)}")
    numbered = [match for path in files if (match := _SHARD.search(path.name))]
    total = max((int(match[2]) for match in numbered), default=0)
    missing = sorted(set(range(total)) - {int(match[1]) for match in numbered})
    if missing or len(numbered) != total:
        text = ", ".join(f"{number:05d}" for number in missing[:5]) or "none, but one exists twice"
        fault = f"{len(numbered)} of {total} files like {files[0].name}; missing: {text}"
        raise ValueError(f"data.root: {files[0].parent} has {fault}")


def _read_shard(root: Path, path: Path) -> tuple[list[ImageFile], list[str]]:
    """Return a file's images and class names. An image's `path` is its name in the file."""
    import pyarrow as pa
    from pyarrow import parquet

    sizes: list[int] = []
    try:
        with parquet.ParquetFile(path) as file:
            has_path = _check_columns(file.schema_arrow, path=path)
            columns = ["label", *(["image.path"] if has_path else [])]
            table = file.read(columns, use_threads=False)
            metadata = file.metadata
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                chunks = (group.column(i) for i in range(group.num_columns))
                wanted = (chunk for chunk in chunks if chunk.path_in_schema == "image.bytes")
                total = sum(chunk.total_uncompressed_size for chunk in wanted)
                sizes += [total // max(1, group.num_rows)] * group.num_rows
            notes = file.schema_arrow.metadata or {}
    except (pa.ArrowException, OSError) as error:
        fault = f"is damaged, truncated or no parquet file: {error}"
        raise ValueError(f"data.root: {path} {fault}") from error
    try:  # the library `datasets` writes class names here; others may not
        features = json.loads(notes[b"huggingface"])["info"]["features"]
        class_names = [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        class_names = []
    stored = path.relative_to(root).as_posix()
    labels = [-1 if label is None else label for label in table["label"].to_pylist()]
    names = [""] * len(labels)
    if has_path:
        names = [(image or {}).get("path") or "" for image in table["image"].to_pylist()]
    images = [
        ImageFile(name, label, size, stored, row, is_estimate=True)
        for row, (name, label, size) in enumerate(zip(names, labels, sizes, strict=True))
    ]
    return images, class_names


def _check_columns(schema: Any, *, path: Path) -> bool:
    """Return whether images have names. Raise ValueError if `image.bytes` or `label` is missing."""
    found = {field.name: str(field.type) for field in schema}
    image = found.get("image", "")
    has_bytes = re.match(r"struct<([^<>]*, )?bytes: (large_)?binary\b", image)
    if not has_bytes or not re.match("u?int", found.get("label", "")):
        columns = ", ".join(f"{name}: {kind}" for name, kind in found.items())
        expected = "expected `image` with bytes and path, and `label`, an integer"
        raise ValueError(f"data.root: {path} has the columns ({columns}); {expected}")
    return re.search("[<, ]path: ", image) is not None


def _footer_digest(path: Path) -> str:
    """Hash a file's footer, which changes with almost every change of the file."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def _stem_and_wnid(path: str) -> tuple[str, str | None]:
    """Return an image's name without its extension and appended wnid, and the wnid (or None)."""
    stem = path.rpartition("/")[2].rpartition(".")[0]
    if match := _SUFFIX.fullmatch(stem):
        return match[1], match[2]
    match = _PREFIX.match(stem)
    return stem, match[1] if match else None


def _class_ids(
    root: Path,
    images: Mapping[str, Sequence[ImageFile]],
    names: Sequence[str],
    synsets: Mapping[str, str],
) -> tuple[str, ...]:
    num_classes = len(names) or 1 + max((image.label for image in images["train"]), default=-1)
    wnids: dict[int, str] = {}
    for image in (image for rows in images.values() for image in rows):
        label, wnid = image.label, _stem_and_wnid(image.path)[1]
        fault = ""
        if not 0 <= label < num_classes:
            fault = f"; expected 0 to {num_classes - 1} (a test split has no labels)"
        elif wnid is not None and wnids.setdefault(label, wnid) != wnid:
            fault = f", but other images with this label are of class {wnids[label]}"
        if fault:
            row = f"row {image.offset} ({image.path or 'without a name'}) has the label {label}"
            raise ValueError(f"data.root: {root / image.stored}: {row}{fault}")
    ordered = [wnids[label] for label in sorted(wnids)]
    for earlier, later in pairwise(ordered):
        if earlier >= later:
            fault = f"but {earlier} has a smaller label than {later}"
            raise ValueError(f"data.root: {root}: labels must follow the wnids' order, {fault}")
    named = names if all(map(_WNID.fullmatch, names)) else []
    for ids in (ordered, named, sorted(synsets)):
        if len(ids) == num_classes and list(ids) == sorted(ids):
            return tuple(ids)
    return tuple(f"{label:04d}" for label in range(num_classes))


def _named(split: str, number: int, image: ImageFile, class_ids: Sequence[str]) -> ImageFile:
    """Give an image the path that it also has in the other sources."""
    name = f"{split}_{number:08d}.jpg"
    if image.path:
        stem, _ = _stem_and_wnid(image.path)
        extension = image.path[image.path.rfind(".") :]
        name = stem + extension if stem else image.path.rpartition("/")[2]
    return replace(image, path=f"{split}/{class_ids[image.label]}/{name}")
