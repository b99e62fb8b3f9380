"""Read CIFAR-10 and CIFAR-100 from their official archives, python or binary, packed or unpacked.

The toy digits have the same file format, so this module reads them too.
"""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from contradiff.sources.cifar_pickle import as_text, read_mapping
from contradiff.sources.tars import check_digest, check_member

CifarName = Literal["cifar10", "cifar100"]
Split = Literal["train", "test"]

SIDE = 32
HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
MAX_MEMBER_BYTES = 1 << 28  # CIFAR's largest file has 155 MB; a larger one could fill the memory
_PIXELS = 3 * SIDE * SIDE


class CifarForm(NamedTuple):
    """A published form of CIFAR: the archive, its folder, and its file of class names."""

    archive: str
    folder: str
    names: str

    @property
    def is_python(self) -> bool:
        """Whether files are pickles. Otherwise, an image is label bytes, then 3072 pixel bytes."""
        return "python" in self.archive

    @property
    def prefix(self) -> str:
        """Prefix of keys for labels: `fine_` in CIFAR-100, which has `coarse_` labels too."""
        return "fine_" if "100" in self.archive else ""

    def split_files(self, split: Split) -> list[str]:
        """Return the names of a split's files, in order."""
        stems = [split]
        if not self.prefix:
            batches = [f"data_batch_{number}" for number in range(1, 6)]
            stems = batches if split == "train" else ["test_batch"]
        return stems if self.is_python else [f"{stem}.bin" for stem in stems]

    @property
    def files(self) -> list[str]:
        """Names of all files that are read."""
        return [*self.split_files("train"), *self.split_files("test"), self.names]


FORMS: Mapping[CifarName, tuple[CifarForm, CifarForm]] = {
    "cifar10": (
        CifarForm("cifar-10-python.tar.gz", "cifar-10-batches-py", "batches.meta"),
        CifarForm("cifar-10-binary.tar.gz", "cifar-10-batches-bin", "batches.meta.txt"),
    ),
    "cifar100": (
        CifarForm("cifar-100-python.tar.gz", "cifar-100-python", "meta"),
        CifarForm("cifar-100-binary.tar.gz", "cifar-100-binary", "fine_label_names.txt"),
    ),
}
"""The python form is tried first. Both forms contain the same images in the same order."""
SHA256S = {
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-100-python.tar.gz": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
}
"""The sha256 checksums that Keras and TensorFlow Datasets use."""


class CifarFiles(NamedTuple):
    """The files of one data set. `place` is the archive, or the folder of unpacked files."""

    form: CifarForm
    place: Path

    @property
    def paths(self) -> list[Path]:
        """The paths on disk: the archive, or each unpacked file."""
        is_packed = self.place.is_file()
        return [self.place] if is_packed else [self.place / name for name in self.form.files]

    def verify(self) -> None:
        """Raise ValueError if the archive's checksum is wrong. Unpacked files are not checked."""
        if self.place.is_file():
            other = "set transfer_data.verify to false if it contains other data on purpose"
            remedy = f"fetch it again from {HOMEPAGE}, or {other}"
            check_digest(self.place, "sha256", SHA256S[self.form.archive], remedy=remedy)


@dataclass(frozen=True)
class TransferSplit:
    """One split of a labelled set. A label is an index of `class_names`; `keys` are image names.

    `read` takes row numbers and returns the images: RGB, 0 to 255, all of one size. Image folders
    may be larger than the memory, since only `read` loads their images.
    """

    labels: Int64[np.ndarray, " n"]
    keys: tuple[str, ...]
    class_names: tuple[str, ...]
    read: Callable[[Sequence[int]], UInt8[np.ndarray, "n 3 side side"]]


def find_cifar(root: Path, name: CifarName) -> CifarFiles:
    """Find CIFAR's archive or unpacked files at `root`. Raises ValueError if files are missing."""
    forms = FORMS[name]
    archives = " or ".join(form.archive for form in forms)
    absent = {form: [n for n in form.files if not (root / n).is_file()] for form in forms}
    for form, missing in absent.items():
        if not missing:
            return CifarFiles(form, root)
    for form in forms:
        path = root if root.is_file() else root / form.archive
        if path.is_file() and path.name == form.archive:
            return CifarFiles(form, path)
    if root.is_file():
        raise ValueError(f"transfer_data.root: {root} is a file, but its name is not {archives}")
    fewest = ", ".join(min(absent.values(), key=len))
    lacks = f"lacks {fewest}" if root.exists() else "does not exist"
    remedy = f"download {archives} from {HOMEPAGE} and put it there, packed or unpacked"
    raise ValueError(f"transfer_data.root: {root} {lacks}; {remedy}")


def read_cifar(files: CifarFiles, *, split: Split) -> TransferSplit:
    """Read one split, in the order of the files. For CIFAR-100, the labels are the fine classes.

    An image without a name in the files gets a key such as `test-00012`. Raises ValueError if the
    files are damaged or not CIFAR.
    """
    form, place = files
    wanted = [form.names, *form.split_files(split)]
    if place.is_file():
        contents = _read_members(place, [f"{form.folder}/{name}" for name in wanted])
    else:
        contents = {str(path): path.read_bytes() for path in (place / name for name in wanted)}
    (shown, content), *batches = contents.items()
    entry = f"{form.prefix}label_names"
    class_names = content.decode("utf-8", "replace").split()
    if form.is_python:
        mapping = read_mapping(content, shown=shown)
        class_names = [as_text(name) for name in _list(mapping, entry, shown=shown)]
    if not class_names:
        raise ValueError(f"{shown}: {entry} is empty")
    pixels: list[UInt8[np.ndarray, "_ 3072"]] = []
    labels: list[int] = []
    keys: list[str] = []
    for shown, content in batches:
        read = _read_pickled if form.is_python else _read_records
        rows, classes, names = read(content, form.prefix, shown=shown)
        for index, label in enumerate(classes):
            if type(label) is not int or not 0 <= label < len(class_names):
                name, last = f"{form.prefix}labels[{index}]", len(class_names) - 1
                raise ValueError(f"{shown}: {name} is {label!r}; expected 0 to {last}")
            labels.append(label)
        pixels.append(rows)
        keys += names if len(names) == len(rows) else [""] * len(rows)
    images = np.concatenate(pixels).reshape(-1, 3, SIDE, SIDE)
    keys = [key or f"{split}-{index:05d}" for index, key in enumerate(keys)]
    return TransferSplit(
        np.array(labels, np.int64), tuple(keys), tuple(class_names), lambda rows: images[[*rows]]
    )


_Batch = tuple[UInt8[np.ndarray, "n _pixels"], list[object], list[str]]
"""Images, labels and names. A row of 3072 pixels has all red values, then green, then blue."""


def _read_pickled(content: bytes, prefix: str, *, shown: str) -> _Batch:
    mapping = read_mapping(content, shown=shown)
    data, labels = mapping.get("data"), _list(mapping, f"{prefix}labels", shown=shown)
    if not isinstance(data, np.ndarray) or data.shape != (len(labels), _PIXELS) or not len(data):
        found = f"of shape {data.shape}" if isinstance(data, np.ndarray) else "no numpy array"
        expected = f"expected {len(labels)} x {_PIXELS}, one row for each label"
        raise ValueError(f"{shown}: data is {found}; {expected}")
    names = _list(mapping, "filenames", shown=shown) if "filenames" in mapping else []
    return np.asarray(data), labels, [as_text(name) for name in names]


def _read_records(content: bytes, prefix: str, *, shown: str) -> _Batch:
    num_labels = 2 if prefix else 1  # CIFAR-100: coarse label, then fine label
    size = num_labels + _PIXELS
    if not content or len(content) % size:
        form = f"{size} bytes (per image: {num_labels} for labels, {_PIXELS} for pixels)"
        fault = f"the size of {len(content)} bytes is not a multiple of {form}"
        raise ValueError(f"{shown}: {fault}; the file is damaged, or from the other CIFAR data set")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, num_labels:], records[:, num_labels - 1].tolist(), []


def _list(mapping: Mapping[str, object], key: str, *, shown: str) -> list[object]:
    value = mapping.get(key)
    if not isinstance(value, list):
        fault = f"the file has no list {key!r}, only {sorted(mapping)}"
        raise ValueError(f"{shown}: {fault}; check transfer_data.source (cifar10 or cifar100)")
    return value


def _read_members(path: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Read the files `wanted` of a .tar.gz, and let gzip compare the archive's checksum."""
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                check_member(member, shown=str(path))
                if member.size > MAX_MEMBER_BYTES or member.name in contents:
                    fault = f"{member.name} exists twice or is too large ({member.size:,} B)"
                    raise ValueError(f"{path}: {fault}; fetch it again from {HOMEPAGE}")
                if member.name in wanted and (file := archive.extractfile(member)):
                    contents[member.name] = file.read()
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        fault = f"truncated or damaged ({error})"
        raise ValueError(f"{path}: {fault}; fetch it again from {HOMEPAGE}") from error
    if missing := sorted(set(wanted) - set(contents)):
        raise ValueError(f"{path}: lacks {', '.join(missing)}; fetch it again from {HOMEPAGE}")
    return {f"{path}: {name}": contents[name] for name in wanted}
