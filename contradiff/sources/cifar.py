"""CIFAR-10 and CIFAR-100: the official archives, packed or unpacked, python or binary.

Other 32-pixel data stored in one of their layouts may be read too, such as the toy digits.
"""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int64, UInt8

from contradiff.sources.cifar_pickle import as_text, read_mapping
from contradiff.sources.tars import check_digest, check_member

CifarName = Literal["cifar10", "cifar100"]
Split = Literal["train", "test"]

SIDE = 32
HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
MAX_MEMBER_BYTES = 1 << 28
"""The largest member has 155 MB. A larger one is not CIFAR's and might fill the memory."""
_PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class CifarForm:
    """One official form of a data set.

    Attributes:
        archive: the archive's name.
        folder: the only folder in the archive.
        names: the file of class names.
        sha256: the archive's digest, as Keras and TensorFlow Datasets pin it.
    """

    archive: str
    folder: str
    names: str
    sha256: str

    @property
    def is_python(self) -> bool:
        """Whether files are pickled; else they are records of label bytes and 3072 pixels."""
        return "python" in self.archive

    @property
    def prefix(self) -> str:
        """Before `labels` and `label_names`: CIFAR-100 has coarse ones too."""
        return "fine_" if "100" in self.archive else ""

    def split_files(self, split: Split) -> list[str]:
        """The files of a split, in order."""
        stems = [split]
        if not self.prefix:
            batches = [f"data_batch_{number}" for number in range(1, 6)]
            stems = batches if split == "train" else ["test_batch"]
        return stems if self.is_python else [f"{stem}.bin" for stem in stems]

    @property
    def files(self) -> list[str]:
        """All files that are read."""
        return [*self.split_files("train"), *self.split_files("test"), self.names]


FORMS: Mapping[CifarName, tuple[CifarForm, CifarForm]] = {
    "cifar10": (
        CifarForm(
            archive="cifar-10-python.tar.gz",
            folder="cifar-10-batches-py",
            names="batches.meta",
            sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        ),
        CifarForm(
            archive="cifar-10-binary.tar.gz",
            folder="cifar-10-batches-bin",
            names="batches.meta.txt",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    "cifar100": (
        CifarForm(
            archive="cifar-100-python.tar.gz",
            folder="cifar-100-python",
            names="meta",
            sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        ),
        CifarForm(
            archive="cifar-100-binary.tar.gz",
            folder="cifar-100-binary",
            names="fine_label_names.txt",
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
}
"""The python form is looked for first; both hold the same images in the same order."""


@dataclass(frozen=True)
class CifarFiles:
    """The files of one data set: `place` is the archive, or the folder of unpacked files."""

    form: CifarForm
    place: Path

    @property
    def paths(self) -> list[Path]:
        """What is on the disk: the archive, or each unpacked file."""
        if self.place.is_file():
            return [self.place]
        return [self.place / name for name in self.form.files]

    def verify(self) -> None:
        """Compare an archive with the official checksum; unpacked files have none.

        Raises:
            ValueError: it is another file.
        """
        if self.place.is_file():
            remedy = (
                f"fetch it again from {HOMEPAGE}, or set transfer_data.verify to false if it is "
                "meant to hold other data"
            )
            expected = self.form.sha256
            check_digest(self.place, algorithm="sha256", expected=expected, remedy=remedy)

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Contents of some files, by the names that messages use. Nothing is written to the disk.

        Raises:
            ValueError: the archive is damaged, holds more than plain files, or lacks one.
        """
        if not self.place.is_file():
            return {str(path): path.read_bytes() for path in (self.place / name for name in names)}
        members = [f"{self.form.folder}/{name}" for name in names]
        contents = _read_members(self.place, set(members))
        return {f"{self.place}: {member}": contents[member] for member in members}


ReadRows: TypeAlias = Callable[[Sequence[int]], UInt8[np.ndarray, "n 3 side side"]]
"""From rows of a split to their images, RGB from 0 to 255, all of one size."""


@dataclass(frozen=True)
class TransferSplit:
    """One split of a labelled set.

    Attributes:
        labels: classes in [0, len(class_names)).
        keys: names of the images.
        class_names: the classes' names.
        read: returns some images. A folder's are read only now: they need not fit into memory.
    """

    labels: Int64[np.ndarray, " n"]
    keys: tuple[str, ...]
    class_names: tuple[str, ...]
    read: ReadRows


def find_cifar(root: Path, name: CifarName) -> CifarFiles:
    """Look for a data set.

    Args:
        root: an archive, or a folder with unpacked files or an archive in it; folders below are
            not searched.
        name: which data set.

    Raises:
        ValueError: it is not there; names transfer_data.root and what is missing.
    """
    forms = FORMS[name]
    archives = " or ".join(form.archive for form in forms)
    if root.is_file():
        for form in forms:
            if root.name == form.archive:
                return CifarFiles(form, root)
        raise ValueError(f"transfer_data.root: {root} is a file, but not {archives}")
    absent = [[file for file in form.files if not (root / file).is_file()] for form in forms]
    for form, missing in zip(forms, absent, strict=True):
        if not missing:
            return CifarFiles(form, root)
    for form in forms:
        if (root / form.archive).is_file():
            return CifarFiles(form, root / form.archive)
    lacks = f"lacks {', '.join(min(absent, key=len))}" if root.exists() else "does not exist"
    raise ValueError(
        f"transfer_data.root: {root} {lacks}; put {archives} there, packed or unpacked (from "
        f"{HOMEPAGE}; nothing is downloaded)"
    )


def read_cifar(files: CifarFiles, *, split: Split) -> TransferSplit:
    """Read one split, in the files' order; of CIFAR-100 the fine classes.

    The files decide how many images and classes there are. If they do not name an image, its key is
    the split and a number.

    Raises:
        ValueError: a file is damaged, is a pickle that wants more than data, or holds images or
            labels of a wrong shape, number or range.
    """
    form = files.form
    (shown, content), *batches = files.read([form.names, *form.split_files(split)]).items()
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
                raise ValueError(
                    f"{shown}: {form.prefix}labels[{index}] is {label!r}; expected 0 to "
                    f"{len(class_names) - 1}"
                )
            labels.append(label)
        pixels.append(rows)
        keys += names if len(names) == len(rows) else [""] * len(rows)
    images = np.concatenate(pixels).reshape(-1, 3, SIDE, SIDE)
    keys = [key or f"{split}-{index:05d}" for index, key in enumerate(keys)]
    return TransferSplit(
        np.array(labels, np.int64), tuple(keys), tuple(class_names), lambda rows: images[[*rows]]
    )


_Batch = tuple[UInt8[np.ndarray, "n _pixels"], list[object], list[str]]
"""Images, labels and names; an image is a whole red plane, then green, then blue."""


def _read_pickled(content: bytes, prefix: str, *, shown: str) -> _Batch:
    mapping = read_mapping(content, shown=shown)
    data, labels = mapping.get("data"), _list(mapping, f"{prefix}labels", shown=shown)
    if not isinstance(data, np.ndarray) or data.shape != (len(labels), _PIXELS) or not len(data):
        found = f"of shape {data.shape}" if isinstance(data, np.ndarray) else "no numpy array"
        raise ValueError(
            f"{shown}: data is {found}; expected {len(labels)} x {_PIXELS}, as there are labels"
        )
    names = _list(mapping, "filenames", shown=shown) if "filenames" in mapping else []
    return np.asarray(data), labels, [as_text(name) for name in names]


def _read_records(content: bytes, prefix: str, *, shown: str) -> _Batch:
    num_labels = 2 if prefix else 1  # CIFAR-100: the coarse label, then the fine one
    size = num_labels + _PIXELS
    if not content or len(content) % size:
        raise ValueError(
            f"{shown}: {len(content)} bytes are not a whole number of records of {size} "
            f"({num_labels} of labels, {_PIXELS} of pixels); it is damaged, or of the other CIFAR"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, num_labels:], records[:, num_labels - 1].tolist(), []


def _list(mapping: Mapping[str, object], key: str, *, shown: str) -> list[object]:
    value = mapping.get(key)
    if not isinstance(value, list):
        raise ValueError(
            f"{shown}: no list {key!r} among its entries {sorted(mapping)}; is it of the other "
            "CIFAR?"
        )
    return value


def _read_members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Read members of a .tar.gz. It is read to its end, so that gzip compares its own checksum."""
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                check_member(member, shown=str(path))
                if member.size > MAX_MEMBER_BYTES or member.name in contents:
                    fault = f"{member.name} twice or with {member.size:,} bytes"
                    raise ValueError(f"{path}: holds {fault}; fetch it again from {HOMEPAGE}")
                if member.name in wanted and (file := archive.extractfile(member)):
                    contents[member.name] = file.read()
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path}: truncated or damaged ({error}); fetch it again from {HOMEPAGE}"
        ) from error
    if missing := sorted(wanted - set(contents)):
        raise ValueError(f"{path}: lacks {', '.join(missing)}; fetch it again from {HOMEPAGE}")
    return contents
