"""ImageNet as Hugging Face has it: parquet shards with `image` {bytes, path} and `label`.

The labels are the classes' places among the sorted wnids already (this is checked where the files'
names show the wnids). Only labels, names and footers are read to list the images.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from contradiff.sources.folder import in_order
from contradiff.sources.listing import SYNSETS_NAME, ImageFile, Listing, name_of, read_synsets

PATTERNS = ("data/{}-*.parquet", "{}-*.parquet", "data/{}/*.parquet", "{}/*.parquet")
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val")}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_WNID = re.compile(r"n\d{8}")
_PREFIX, _SUFFIX = re.compile(r"(n\d{8})_"), re.compile(r"(.+)_(n\d{8})")


@dataclass
class _Rows:
    """A split's rows, file after file, and what was seen of the files."""

    labels: list[int]
    names: list[str | None]
    places: list[tuple[str, int, int]]
    """The file, the row in it, and the mean size of an image in its row group."""
    facts: str
    class_names: list[str]


def parquet_files(root: Path, split: str) -> list[Path]:
    """The shards of a split, `data/train-00000-of-00294.parquet` and the like, sorted."""
    for name in SPLIT_NAMES[split]:
        for pattern in PATTERNS:
            if found := sorted(root.glob(pattern.format(name))):
                return found
    return []


def scan_parquet(root: Path, *, shown_root: str) -> Listing:
    """List the images in parquet shards.

    A class's id is its wnid where the images' names (or `LOC_synset_mapping.txt`) tell it, else
    its label in four digits. An image without a name is named by its row.

    Raises:
        ValueError: shards are missing or damaged, have other columns, or labels that are out of
            range or do not follow the wnids.
    """
    rows: dict[str, _Rows] = {}
    for split, split_names in SPLIT_NAMES.items():
        files = parquet_files(root, split)
        if not files:
            patterns = [p.format(name) for name in split_names for p in PATTERNS]
            raise ValueError(
                f"data.root: {shown_root} has no {split} shards: none of {', '.join(patterns)}"
            )
        _check_complete(files, shown_root=shown_root)
        rows[split] = _read_rows(root, files, shown_root=shown_root)
    known = rows["train"].class_names
    num_classes = len(known) or 1 + max(rows["train"].labels, default=-1)
    for split, found in rows.items():
        _check_range(found, num_classes, shown=f"{shown_root}: {split}")
    synsets = read_synsets(root / SYNSETS_NAME)
    class_ids = _class_ids(rows, num_classes, synsets, shown_root=shown_root)
    class_names = [name_of(name) for name in known] or [synsets.get(i, i) for i in class_ids]
    splits = {
        split: in_order(_image_files(split, found, class_ids)) for split, found in rows.items()
    }
    facts = "".join(found.facts for found in rows.values())
    return Listing(class_ids, tuple(class_names), splits, facts)


def _check_complete(files: Sequence[Path], *, shown_root: str) -> None:
    numbered = [match for path in files if (match := _SHARD.search(path.name))]
    if not numbered:
        return
    total = max(int(match[2]) for match in numbered)
    missing = sorted(set(range(total)) - {int(match[1]) for match in numbered})
    if missing or len(numbered) != total:
        text = ", ".join(f"{number:05d}" for number in missing[:5]) or "one twice"
        raise ValueError(
            f"data.root: {shown_root} has {len(numbered)} of {total} shards like {files[0].name}; "
            f"missing: {text}"
        )


def _read_rows(root: Path, files: Sequence[Path], *, shown_root: str) -> _Rows:
    import pyarrow as pa
    from pyarrow import parquet

    rows = _Rows([], [], [], "", [])
    for path in files:
        stored = path.relative_to(root).as_posix()
        shown = f"{shown_root}/{stored}"
        try:
            with parquet.ParquetFile(path) as file:
                has_path = _check_columns(file.schema_arrow, shown=shown)
                columns = ["label", *(["image.path"] if has_path else [])]
                table = file.read(columns, use_threads=False)
                sizes = _mean_sizes(file.metadata)
                names = _class_names(file.schema_arrow.metadata)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"data.root: {shown} is damaged, truncated or no parquet file: {error}"
            ) from error
        if rows.class_names and names != rows.class_names:
            raise ValueError(f"data.root: {shown} has other class names than the shards before it")
        rows.class_names = names
        rows.labels += [-1 if label is None else label for label in table["label"].to_pylist()]
        rows.names += (
            [(image or {}).get("path") for image in table["image"].to_pylist()]
            if has_path
            else [None] * len(table)
        )
        rows.places += [(stored, row, size) for row, size in enumerate(sizes)]
        rows.facts += f"{stored}\t{path.stat().st_size}\t{_footer_digest(path)}\n"
    return rows


def _check_columns(schema: Any, *, shown: str) -> bool:
    """Whether the images have names; `image` and `label` they must have."""
    from pyarrow import types

    found = {field.name: field.type for field in schema}
    image, label = found.get("image"), found.get("label")
    members = {f.name: f.type for f in image} if image and types.is_struct(image) else {}
    holds_bytes = members.get("bytes") and (
        types.is_binary(members["bytes"]) or types.is_large_binary(members["bytes"])
    )
    if not holds_bytes or label is None or not types.is_integer(label):
        columns = ", ".join(f"{name}: {kind}" for name, kind in found.items())
        raise ValueError(
            f"data.root: {shown} has the columns ({columns}); expected `image` of bytes and path, "
            "and `label`, a whole number"
        )
    return "path" in members


def _mean_sizes(metadata: Any) -> list[int]:
    """For each row, the mean size of an image in its row group: bytes themselves are not read."""
    sizes: list[int] = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        total = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "image.bytes")
        sizes += [total // max(1, group.num_rows)] * group.num_rows
    return sizes


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str]:
    """The label's names as `datasets` keeps them in the file, if it does."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []  # written by something else: names are optional


def _footer_digest(path: Path) -> str:
    """Hash of the footer: every column chunk's place and size, so a changed image shows in it."""
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return hashlib.sha256(file.read()).hexdigest()


def _check_range(rows: _Rows, num_classes: int, *, shown: str) -> None:
    for label, (stored, row, _) in zip(rows.labels, rows.places, strict=True):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"data.root: {shown}: the label of row {row} of {stored} is {label}; expected 0 to "
                f"{num_classes - 1} (a test split has no labels)"
            )


def _stem_and_wnid(path: str | None) -> tuple[str, str | None]:
    """`n01440764_10026` and `n01440764` of `n01440764_10026_n01440764.JPEG`.

    Hugging Face appended the wnid to the names of all images; it is taken off again.
    """
    stem = (path or "").rpartition("/")[2].rpartition(".")[0]
    if match := _SUFFIX.fullmatch(stem):
        return match[1], match[2]
    match = _PREFIX.match(stem)
    return stem, match[1] if match else None


def _class_ids(
    rows: dict[str, _Rows], num_classes: int, synsets: dict[str, str], *, shown_root: str
) -> tuple[str, ...]:
    wnids: dict[int, str] = {}
    for found in rows.values():
        for label, path, (stored, row, _) in zip(
            found.labels, found.names, found.places, strict=True
        ):
            wnid = _stem_and_wnid(path)[1]
            if wnid is not None and wnids.setdefault(label, wnid) != wnid:
                raise ValueError(
                    f"data.root: {shown_root}/{stored}: row {row} ({path}) has label {label}, "
                    f"which is {wnids[label]} elsewhere"
                )
    ordered = [wnids[label] for label in sorted(wnids)]
    if ordered != sorted(set(ordered)):
        wrong = next(later for earlier, later in pairwise(ordered) if earlier >= later)
        raise ValueError(
            f"data.root: {shown_root}: labels are not the wnids' places in sorted order, as they "
            f"are in all other sources (see {wrong})"
        )
    names = rows["train"].class_names
    if len(wnids) == num_classes:
        return tuple(ordered)
    if names == sorted(names) and all(map(_WNID.fullmatch, names)) and names:
        return tuple(names)
    if len(synsets) == num_classes:
        return tuple(sorted(synsets))
    return tuple(f"{label:04d}" for label in range(num_classes))


def _image_files(split: str, rows: _Rows, class_ids: Sequence[str]) -> list[ImageFile]:
    files: list[ImageFile] = []
    for number, (label, path, (stored, row, size)) in enumerate(
        zip(rows.labels, rows.names, rows.places, strict=True)
    ):
        name = f"{split}_{number:08d}.jpg"
        if path:
            stem, _ = _stem_and_wnid(path)
            name = stem + path[path.rfind(".") :] if stem else path.rpartition("/")[2]
        place = f"{split}/{class_ids[label]}/{name}"
        files.append(ImageFile(place, label, size, stored, row, is_estimate=True))
    return files
