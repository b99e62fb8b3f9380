"""CIFAR-10 and CIFAR-100 in both official forms, and data stored in one of their layouts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from contradiff.sources.cifar_files import CifarFiles, CifarName, Split
from contradiff.sources.cifar_pickle import as_text, read_mapping, uint8_matrix

SIDE = 32
_PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class CifarSplit:
    """One split, in the files' order.

    Attributes:
        images: RGB from 0 to 255.
        labels: Classes, of CIFAR-100 the fine ones, in [0, len(class_names)).
        class_names: The classes' names.
        keys: The images' names, where the files hold them, else the split and a number.
    """

    images: UInt8[np.ndarray, "n 3 32 32"]
    labels: Int64[np.ndarray, " n"]
    class_names: list[str]
    keys: list[str]


@dataclass(frozen=True)
class _Fields:
    """What the files call labels and names, and where a binary record has its label."""

    labels: str
    label_names: str
    num_label_bytes: int


_FIELDS: Mapping[CifarName, _Fields] = {
    "cifar10": _Fields("labels", "label_names", 1),
    # the coarse label, then the fine one
    "cifar100": _Fields("fine_labels", "fine_label_names", 2),
}

_Part = tuple[UInt8[np.ndarray, "n 3 32 32"], list[int], list[str]]


def read_cifar(files: CifarFiles, name: CifarName, *, split: Split) -> CifarSplit:
    """Read one split from an archive or an unpacked folder.

    The number of images and classes is what the files hold, so that other 32-pixel data may use
    the layouts.

    Args:
        files: as from `find_cifar`.
        name: which of the two sets.
        split: which half.

    Raises:
        ValueError: a file is damaged, is a pickle that wants more than data, or holds images or
            labels of a wrong shape, number or range.
    """
    layout, fields = files.layout, _FIELDS[name]
    names = (layout.names, *layout.splits[split])
    contents = dict(zip(names, files.read(names), strict=True))
    shown = files.shown(layout.names)
    class_names = _class_names(contents.pop(layout.names), files, fields, shown=shown)
    if not class_names:
        raise ValueError(f"{shown}: {fields.label_names} is empty")
    read = _read_pickled if layout.encoding == "python" else _read_records
    parts: list[_Part] = []
    for file, content in contents.items():
        shown = files.shown(file)
        parts.append(read(content, fields, shown=shown))
        for index, label in enumerate(parts[-1][1]):
            if not 0 <= label < len(class_names):
                raise ValueError(
                    f"{shown}: {fields.labels}[{index}] is {label}; "
                    f"expected 0 to {len(class_names) - 1}"
                )
    keys = [key for _, _, part_keys in parts for key in part_keys]
    return CifarSplit(
        images=np.concatenate([images for images, _, _ in parts]),
        labels=np.array([label for _, labels, _ in parts for label in labels], dtype=np.int64),
        class_names=class_names,
        keys=[key or f"{split}-{index:05d}" for index, key in enumerate(keys)],
    )


def _class_names(content: bytes, files: CifarFiles, fields: _Fields, *, shown: str) -> list[str]:
    if files.layout.encoding == "binary":
        return content.decode("utf-8", "replace").split()
    mapping = read_mapping(content, shown=shown)
    return [as_text(name) for name in _list(mapping, fields.label_names, shown=shown)]


def _read_pickled(content: bytes, fields: _Fields, *, shown: str) -> _Part:
    """`data` has a row an image: a whole red plane, then green, then blue."""
    mapping = read_mapping(content, shown=shown)
    matrix = uint8_matrix(_entry(mapping, "data", shown=shown), columns=_PIXELS, shown=shown)
    labels = _list(mapping, fields.labels, shown=shown)
    if len(labels) != len(matrix):
        raise ValueError(f"{shown}: {len(labels)} {fields.labels} for {len(matrix)} images")
    classes: list[int] = []
    for index, label in enumerate(labels):
        if type(label) is not int:
            raise ValueError(f"{shown}: {fields.labels}[{index}] is {label!r}, no whole number")
        classes.append(label)
    names = _list(mapping, "filenames", shown=shown) if "filenames" in mapping else []
    # Data that others store in the layout may go without.
    keys = [as_text(name) for name in names] if len(names) == len(matrix) else [""] * len(matrix)
    # The copy is contiguous and writable: torch.from_numpy wants that.
    images = matrix.reshape(len(matrix), 3, SIDE, SIDE).copy(order="C")
    return images, classes, keys


def _read_records(content: bytes, fields: _Fields, *, shown: str) -> _Part:
    size = fields.num_label_bytes + _PIXELS
    if not content or len(content) % size:
        raise ValueError(
            f"{shown}: {len(content)} bytes are not a whole number of records of {size} "
            f"({fields.num_label_bytes} of labels, {_PIXELS} of pixels); it is damaged, or of the "
            "other CIFAR"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, fields.num_label_bytes - 1].tolist()
    images = records[:, fields.num_label_bytes :].reshape(-1, 3, SIDE, SIDE).copy(order="C")
    return images, labels, [""] * len(records)


def _entry(mapping: Mapping[str, object], key: str, *, shown: str) -> object:
    if key not in mapping:
        raise ValueError(
            f"{shown}: no entry {key!r}, only {sorted(mapping)}; is it of the other CIFAR?"
        )
    return mapping[key]


def _list(mapping: Mapping[str, object], key: str, *, shown: str) -> list[object]:
    value = _entry(mapping, key, shown=shown)
    if not isinstance(value, list):
        raise ValueError(f"{shown}: {key} is no list but {type(value).__name__}")
    return value
