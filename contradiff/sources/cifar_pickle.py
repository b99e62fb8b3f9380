"""Reader of the pickles in CIFAR's python archives, which runs nothing that they ask for.

A pickle may run any code. This reader does not let it: the few names that the format needs are
bound to the inert stand-ins below, so that not even numpy's own restoring code sees the file's
content, and every other name is refused.
"""

import io
import pickle  # noqa: TID251 - only for its parser, see above
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

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
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
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
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which CIFAR does not need"
            ) from None


def read_mapping(content: bytes, *, shown: str) -> dict[str, object]:
    """Unpickle a file's mapping: strings, numbers, lists, and matrices for `uint8_matrix`.

    Args:
        content: the whole file.
        shown: how messages name it.

    Raises:
        ValueError: it is no pickle, wants more than data, or holds no mapping.
    """
    try:
        value: object = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _UNREADABLE as error:
        raise ValueError(
            f"{shown}: not a file of CIFAR's python archive: {error or type(error).__name__}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{shown}: expected a mapping, found {type(value).__name__}")
    # Python 2 wrote the keys as byte strings; a file saved anew by Python 3 may hold text.
    return {as_text(key): entry for key, entry in value.items()}


def as_text(value: object) -> str:
    """A string, which Python 2 wrote as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def uint8_matrix(value: object, *, columns: int, shown: str) -> UInt8[np.ndarray, "rows columns"]:
    """What stands for a numpy matrix in `read_mapping`'s result => the matrix.

    Raises:
        ValueError: it is no matrix of single bytes with so many columns and a row at least.
    """
    match value.state if isinstance(value, _Array) else None:
        case (_, (int(num_rows), int(num_columns)), _Dtype(name=name), is_fortran, bytes(raw)):
            pass
        case _:
            raise ValueError(f"{shown}: data is no numpy matrix, images by values")
    if as_text(name) not in ("u1", "|u1") or num_columns != columns:
        raise ValueError(
            f"{shown}: data is {num_rows} x {num_columns} of {as_text(name)}; "
            f"expected n x {columns} of u1"
        )
    if num_rows < 1 or len(raw) != num_rows * columns:
        raise ValueError(f"{shown}: data has {len(raw)} bytes for {num_rows} images of {columns}")
    order = "F" if is_fortran else "C"
    return np.frombuffer(raw, np.uint8).reshape(num_rows, columns, order=order)
