"""scikit-learn's handwritten digits, stored in the layout of CIFAR-100's python archive.

They are 1797 real scans of 8 x 8 pixels that need no download, and stand in for CIFAR-100 where
features are transferred to another data set.
"""

import pickle  # noqa: TID251  (the opcodes' names; nothing is unpickled)
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from contradiff.files import replace_dir

FINE_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COARSE_NAMES = ("even", "odd")
# load_digits counts a block's dark pixels: 0 to 16.
_BRIGHTEST = 16.0


def _upsampled(
    scans: UInt8[np.ndarray, "n 8 8"], image_size: int
) -> UInt8[np.ndarray, "n _values"]:
    """Bicubic enlargements as CIFAR's rows: a whole red plane, then green, then blue, all equal."""
    rows: list[UInt8[np.ndarray, " _values"]] = []
    for scan in scans:
        grey = Image.fromarray(scan.astype(np.float32) * np.float32(255 / _BRIGHTEST))
        large = np.asarray(grey.resize((image_size, image_size), Image.Resampling.BICUBIC))
        # Bicubic interpolation overshoots at edges.
        plane = np.rint(np.clip(large, 0, 255)).astype(np.uint8)
        rows.append(np.tile(plane.ravel(), 3))
    return np.stack(rows)


# The official files were pickled by Python 2, whose byte strings Python 3 cannot write (it encodes
# bytes by way of text). They are therefore written here opcode by opcode, the same the official
# files consist of, so that every reader of those reads these: with encoding="bytes" the keys are
# bytes, with encoding="latin1" they are text. The bytes depend on no version of numpy either.


def _string(value: bytes) -> bytes:
    if len(value) < 256:
        return pickle.SHORT_BINSTRING + bytes([len(value)]) + value
    return pickle.BINSTRING + struct.pack("<i", len(value)) + value


def _integer(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def _list(items: list[bytes]) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS


def _matrix(values: UInt8[np.ndarray, "rows columns"]) -> bytes:
    """A uint8 matrix in C order, as `numpy.ndarray.__reduce__` describes it."""
    array = (
        pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n"
        + pickle.MARK + pickle.GLOBAL + b"numpy\nndarray\n"
        + _integer(0) + pickle.TUPLE1 + _string(b"b") + pickle.TUPLE + pickle.REDUCE
    )  # fmt: skip
    # numpy's state of a dtype: version, byte order, (subarray, names, fields), size, alignment,
    # flags.
    dtype = (
        pickle.GLOBAL + b"numpy\ndtype\n"
        + _string(b"u1") + _integer(0) + _integer(1) + pickle.TUPLE3 + pickle.REDUCE
        + pickle.MARK + _integer(3) + _string(b"|") + 3 * pickle.NONE
        + _integer(-1) + _integer(-1) + _integer(0) + pickle.TUPLE + pickle.BUILD
    )  # fmt: skip
    rows, columns = values.shape
    state = (
        pickle.MARK + _integer(1) + _integer(rows) + _integer(columns) + pickle.TUPLE2
        + dtype + pickle.NEWFALSE + _string(values.tobytes()) + pickle.TUPLE
    )  # fmt: skip
    return array + state + pickle.BUILD


def _pickled(content: dict[bytes, bytes]) -> bytes:
    """A mapping in protocol 2; its values are pickled already."""
    items = b"".join(_string(key) + value for key, value in content.items())
    protocol = pickle.PROTO + bytes([2])
    return protocol + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _split_file(
    *,
    scans: UInt8[np.ndarray, "n 8 8"],
    labels: Int64[np.ndarray, " n"],
    indices: Int64[np.ndarray, " m"],
    batch_label: bytes,
    image_size: int,
) -> bytes:
    fine = [int(labels[index]) for index in indices]
    names = [
        f"{FINE_NAMES[label]}_s_{index:06d}.png".encode()
        for label, index in zip(fine, indices.tolist(), strict=True)
    ]
    return _pickled(
        {
            b"filenames": _list([_string(name) for name in names]),
            b"batch_label": _string(batch_label),
            b"fine_labels": _list([_integer(label) for label in fine]),
            b"coarse_labels": _list([_integer(label % 2) for label in fine]),
            b"data": _matrix(_upsampled(scans[indices], image_size)),
        }
    )


def _meta_file() -> bytes:
    return _pickled(
        {
            b"fine_label_names": _list([_string(name.encode()) for name in FINE_NAMES]),
            b"coarse_label_names": _list([_string(name.encode()) for name in COARSE_NAMES]),
        }
    )


def _check_replaceable(root: Path) -> None:
    """Refuse to replace a folder that this module did not write: real data would be lost."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    meta = root / "meta"
    if not meta.is_file() or meta.read_bytes() != _meta_file():
        raise ValueError(
            f"{root}: holds something other than the digits, which would replace it; set "
            f"transfer_data.source to cifar100 to read it, or transfer_data.root to another folder"
        )


def write_digits_archive(
    root: Path, *, image_size: int = 32, num_train_per_class: int, seed: int
) -> None:
    """Write the digits as files `train`, `test` and `meta`, laid out as cifar-100-python's.

    The fine classes are the ten digits, the coarse ones even and odd. `train` is the pool of which
    few-shot training sets are drawn, `test` all other digits, both in random order. A file name
    ends with the image's index in `sklearn.datasets.load_digits`.

    Args:
        root: The folder to write; an earlier one of the same kind is replaced.
        image_size: Side that the 8 x 8 scans are enlarged to, in pixels; CIFAR's is 32.
        num_train_per_class: Training images of every class, at most 173 (of 174 or more).
        seed: Seed of the split and the order, not negative.

    Raises:
        ValueError: a class would have no training or no test image, or `root` holds something
            else.
    """
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    scans = np.asarray(pixels, dtype=np.uint8).reshape(-1, 8, 8)
    labels = np.asarray(targets, dtype=np.int64)

    fewest = int(np.bincount(labels).min())
    if not 1 <= num_train_per_class < fewest:
        raise ValueError(
            f"num_train_per_class is {num_train_per_class}, but must leave every class a training "
            f"and a test image: set it to 1 to {fewest - 1}"
        )
    _check_replaceable(root)

    order = np.random.default_rng(seed).permutation(len(labels))
    # How many images of its own class come before each image in the order.
    rank = np.empty(len(labels), dtype=np.int64)
    for label in range(len(FINE_NAMES)):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    is_train = rank[order] < num_train_per_class

    with replace_dir(root) as temporary:
        (temporary / "meta").write_bytes(_meta_file())
        for name, indices, batch_label in (
            ("train", order[is_train], b"training batch 1 of 1"),
            ("test", order[~is_train], b"testing batch 1 of 1"),
        ):
            content = _split_file(
                scans=scans,
                labels=labels,
                indices=indices,
                batch_label=batch_label,
                image_size=image_size,
            )
            (temporary / name).write_bytes(content)
