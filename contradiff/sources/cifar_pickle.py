"""Read the pickle files in CIFAR's python archives safely.

A pickle can call any Python function. This reader allows only functions that build byte arrays.
"""

import io
import pickle  # noqa: TID251 - only the few names below are allowed
from typing import Any

import numpy as np


class _Dtype:
    """Used instead of numpy's dtype, which would accept harmful flags from a file."""

    def __init__(self, name: object, *_flags: object) -> None:
        if name not in ("u1", "|u1", b"u1", b"|u1"):
            raise pickle.UnpicklingError(f"the array has the dtype {name!r}, not u1")

    def __setstate__(self, state: object) -> None: ...


class _ByteArray(np.ndarray):
    def __setstate__(self, state: Any, /) -> None:
        version, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("the array has no dtype")
        super().__setstate__((version, shape, np.dtype(np.uint8), is_fortran, content))


def _encode(text: str, encoding: object = "latin1") -> bytes:
    """Used instead of `_codecs.encode`, which some pickles of Python 3 call to build bytes."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(
            f"bytes have the encoding {encoding!r}, but only latin1 is allowed"
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
            raise pickle.UnpicklingError(f"the file calls {name}, which CIFAR does not need")
        return _KNOWN[name]


def read_mapping(content: bytes, *, shown: str) -> dict[str, object]:
    """Unpickle a dictionary. Raises ValueError, which begins with `shown`, if this fails."""
    try:
        value: object = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # pickle does not document which errors a damaged file causes
        reason = error or type(error).__name__
        raise ValueError(f"{shown}: not a file of CIFAR's python archive: {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{shown}: expected a mapping, found {type(value).__name__}")
    return {as_text(key): entry for key, entry in value.items()}


def as_text(value: object) -> str:
    """Return a value as text. Python 2 wrote text as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
