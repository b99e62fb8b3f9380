"""Reads the pickles in CIFAR's python archives, and runs nothing that they ask for.

A pickle may call any function. This reader knows only the few that rebuild numpy arrays of bytes.
"""

import io
import pickle  # noqa: TID251 - with the few names below and no others
from typing import Any

import numpy as np


class _Dtype:
    """Stands for numpy's dtype of bytes. The real one would take hostile flags from a file."""

    def __init__(self, name: object, *_flags: object) -> None:
        if name not in ("u1", "|u1", b"u1", b"|u1"):
            raise pickle.UnpicklingError(f"its array is of {name!r}, not of u1")

    def __setstate__(self, state: object) -> None: ...


class _ByteArray(np.ndarray):
    def __setstate__(self, state: Any, /) -> None:
        version, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("its array has no dtype")
        super().__setstate__((version, shape, np.dtype(np.uint8), is_fortran, content))


def _encode(text: str, encoding: object = "latin1") -> bytes:
    """Python 3 writes bytes so in protocol 2."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(
            f"bytes have the encoding {encoding!r}; only latin1 is accepted"
        )
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_KNOWN = {
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.ndarray": _ByteArray,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
}


class _CifarUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {name}, which CIFAR does not need")
        return _KNOWN[name]


def read_mapping(content: bytes, *, shown: str) -> dict[str, object]:
    """Unpickle a mapping of plain data only; otherwise raise ValueError, naming file `shown`."""
    try:
        value: object = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # pickle leaves open what it raises for a damaged file
        reason = error or type(error).__name__
        raise ValueError(f"{shown}: not a file of CIFAR's python archive: {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{shown}: expected a mapping, found {type(value).__name__}")
    return {as_text(key): entry for key, entry in value.items()}


def as_text(value: object) -> str:
    """A string. Python 2 wrote it as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
