"""Reader of CIFAR-100's official python archive, and of data stored in its layout.

The archive is pickled, and a pickle may run any code. This reader does not let it: the few names
that the format needs are bound to the inert stand-ins below, so that not even numpy's own
restoring code sees the file's content, and every other name is refused.
"""

import pickle  # noqa: TID251 - only for its parser, see above
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from pydantic import Field

from contradiff.config import Section

SIDE = 32
_PIXELS = 3 * SIDE * SIDE

# What pickle raises over bytes that are no pickle; its documentation leaves the list open.
_UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)


class TransferDataParams(Section):
    """Section `transfer_data`: the set that features are transferred to."""

    source: Literal["digits", "cifar100"] = Field(description="digits: written where root says")
    root: str = Field(min_length=1, description="folder that holds train, test and meta")


@dataclass(frozen=True)
class CifarSplit:
    """One split of CIFAR-100, in the file's order.

    Attributes:
        images: RGB from 0 to 255.
        labels: Fine labels, in [0, len(class_names)).
        class_names: Fine classes' names.
    """

    images: UInt8[np.ndarray, "n 3 32 32"]
    labels: Int64[np.ndarray, " n"]
    class_names: list[str]


class _Dtype:
    """Stand-in for `numpy.dtype`: remembers the name that it was made with."""

    def __init__(self, name: object, *_flags: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Ignore byte order, fields and metadata: only single bytes are read."""


class _Array:
    """Stand-in for `numpy.ndarray`: remembers the state that numpy's would be restored from."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def _reconstruct(*_type_shape_code: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: object = "latin1") -> bytes:
    """Stand-in for `_codecs.encode`, by which Python 3 writes bytes in protocol 2."""
    if encoding not in ("latin1", b"latin1"):
        msg = f"bytes encoded as {encoding!r}"
        raise pickle.UnpicklingError(msg)
    return text.encode("latin1")


_STAND_INS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _CifarUnpickler(pickle.Unpickler):
    """Knows the stand-ins and nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _STAND_INS[module_name, global_name]
        except KeyError:
            msg = f"it asks for {module_name}.{global_name}, which CIFAR-100 does not need"
            raise pickle.UnpicklingError(msg) from None


def _read_mapping(path: Path) -> dict[str, object]:
    if not path.is_file():
        msg = f"{path}: no such file; transfer.root must hold CIFAR-100's train, test and meta"
        raise ValueError(msg)
    try:
        with path.open("rb") as file:
            content: object = _CifarUnpickler(file, encoding="bytes").load()
    except _UNREADABLE as error:
        msg = f"{path}: not a file of CIFAR-100's python archive: {error or type(error).__name__}"
        raise ValueError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path}: expected a mapping, found {type(content).__name__}"
        raise ValueError(msg)
    # Python 2 wrote the keys as byte strings; a file saved anew by Python 3 may hold text.
    return {_text(key): value for key, value in content.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _entry(content: Mapping[str, object], key: str, path: Path) -> object:
    if key not in content:
        msg = f"{path}: no entry {key!r}, only {sorted(content)}; is it CIFAR-100 (not CIFAR-10)?"
        raise ValueError(msg)
    return content[key]


def _list(content: Mapping[str, object], key: str, path: Path) -> list[object]:
    value = _entry(content, key, path)
    if not isinstance(value, list):
        msg = f"{path}: {key} is no list but {type(value).__name__}"
        raise ValueError(msg)
    return value  # pyright: ignore[reportUnknownVariableType]


def _images(content: Mapping[str, object], path: Path) -> UInt8[np.ndarray, "n 3 32 32"]:
    """`data`: uint8 rows of 3072 values, a whole red plane, then green, then blue."""
    array = _entry(content, "data", path)
    match array.state if isinstance(array, _Array) else None:
        case (_, (int(rows), int(columns)), _Dtype(name=name), is_fortran, bytes(raw)):
            pass
        case _:
            msg = f"{path}: data is no numpy matrix, images by values"
            raise ValueError(msg)
    if _text(name) not in ("u1", "|u1") or columns != _PIXELS:
        msg = f"{path}: data is {rows} x {columns} of {_text(name)}; expected n x {_PIXELS} of u1"
        raise ValueError(msg)
    if rows < 1 or len(raw) != rows * columns:
        msg = f"{path}: data has {len(raw)} bytes for {rows} images of {columns}"
        raise ValueError(msg)
    matrix = np.frombuffer(raw, np.uint8).reshape(rows, columns, order="F" if is_fortran else "C")
    # The copy is contiguous and writable: torch.from_numpy wants that.
    return matrix.reshape(rows, 3, SIDE, SIDE).copy(order="C")


def _labels(
    content: Mapping[str, object], path: Path, *, num_images: int, num_classes: int
) -> Int64[np.ndarray, " n"]:
    values = _list(content, "fine_labels", path)
    if len(values) != num_images:
        msg = f"{path}: {len(values)} fine_labels for {num_images} images"
        raise ValueError(msg)
    labels: list[int] = []
    for index, value in enumerate(values):
        if type(value) is not int or not 0 <= value < num_classes:
            msg = f"{path}: fine_labels[{index}] is {value!r}; expected 0 to {num_classes - 1}"
            raise ValueError(msg)
        labels.append(value)
    return np.array(labels, dtype=np.int64)


def read_cifar100(root: Path, *, split: Literal["train", "test"]) -> CifarSplit:
    """Read one split of CIFAR-100's python archive as it is unpacked.

    The number of images and classes is what the files hold, so that other 32-pixel data may use
    the layout.

    Args:
        root: Folder that holds `train`, `test` and `meta`.
        split: Which of the two files to read.

    Raises:
        ValueError: a file is missing, is no such archive (or a pickle that wants more than data),
            or holds images or labels of a wrong shape, number or range.
    """
    meta, path = root / "meta", root / split
    class_names = [_text(name) for name in _list(_read_mapping(meta), "fine_label_names", meta)]
    if not class_names:
        msg = f"{meta}: fine_label_names is empty"
        raise ValueError(msg)
    content = _read_mapping(path)
    images = _images(content, path)
    labels = _labels(content, path, num_images=len(images), num_classes=len(class_names))
    return CifarSplit(images=images, labels=labels, class_names=class_names)
