"""Where CIFAR's files lie: in the official archive, read in memory, or in its unpacked folder."""

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

CifarName = Literal["cifar10", "cifar100"]
Split = Literal["train", "test"]

HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
MAX_MEMBER_BYTES = 1 << 28
"""More than the largest member has (155 MB); a larger one is no CIFAR and might fill the memory."""


@dataclass(frozen=True)
class Layout:
    """One official form of a data set, python or binary.

    Attributes:
        archive: the archive's name.
        md5: of the archive, as on the home page.
        sha256: of the archive, as Keras and TensorFlow Datasets pin it.
        folder: the only folder in it.
        encoding: python: pickled | binary: records of label bytes and 3072 pixels.
        names: the file of class names.
        splits: the files of each split, in order.
    """

    archive: str
    md5: str
    sha256: str
    folder: str
    encoding: Literal["python", "binary"]
    names: str
    splits: Mapping[Split, tuple[str, ...]]

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read."""
        return (*self.splits["train"], *self.splits["test"], self.names)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

# The python form is looked for first; both hold the same images in the same order.
LAYOUTS: Mapping[CifarName, tuple[Layout, ...]] = {
    "cifar10": (
        Layout(
            archive="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            folder="cifar-10-batches-py",
            encoding="python",
            names="batches.meta",
            splits={"train": _BATCHES, "test": ("test_batch",)},
        ),
        Layout(
            archive="cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            folder="cifar-10-batches-bin",
            encoding="binary",
            names="batches.meta.txt",
            splits={
                "train": tuple(f"{name}.bin" for name in _BATCHES),
                "test": ("test_batch.bin",),
            },
        ),
    ),
    "cifar100": (
        Layout(
            archive="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            folder="cifar-100-python",
            encoding="python",
            names="meta",
            splits={"train": ("train",), "test": ("test",)},
        ),
        Layout(
            archive="cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            folder="cifar-100-binary",
            encoding="binary",
            names="fine_label_names.txt",
            splits={"train": ("train.bin",), "test": ("test.bin",)},
        ),
    ),
}


@dataclass(frozen=True)
class CifarFiles:
    """The files of one data set, wherever they are: `place` is an archive or a folder."""

    layout: Layout
    place: Path

    @property
    def is_archive(self) -> bool:
        """Whether the files are still packed."""
        return self.place.is_file()

    @property
    def paths(self) -> list[Path]:
        """What is on the disk: the archive, or each unpacked file."""
        return [self.place] if self.is_archive else [self.place / n for n in self.layout.files]

    def shown(self, name: str) -> str:
        """How a message names a file."""
        path = f"{self.place}: {self.layout.folder}" if self.is_archive else str(self.place)
        return f"{path}/{name}"

    def read(self, names: Sequence[str]) -> list[bytes]:
        """Contents of some files. Of an archive nothing is extracted to the disk.

        Raises:
            ValueError: the archive is damaged, holds more than plain files, or lacks one.
        """
        if not self.is_archive:
            return [(self.place / name).read_bytes() for name in names]
        members = {f"{self.layout.folder}/{name}" for name in names}
        contents = _read_members(self.place, members)
        return [contents[f"{self.layout.folder}/{name}"] for name in names]

    def verify(self) -> None:
        """Compare an archive with the official checksums; unpacked files have none.

        Raises:
            ValueError: it is another file; names both digests.
        """
        if not self.is_archive:
            return
        for name in ("sha256", "md5"):
            with self.place.open("rb") as file:
                found = hashlib.file_digest(
                    file, lambda name=name: hashlib.new(name, usedforsecurity=False)
                ).hexdigest()
            expected = getattr(self.layout, name)
            if found != expected:
                raise ValueError(
                    f"{self.place}: not the official {self.layout.archive}: its {name} is {found}, "
                    f"expected {expected}; fetch it again from {HOMEPAGE}, or set "
                    "transfer_data.verify to false if it is meant to hold other data"
                )


def find_cifar(root: Path, name: CifarName, *, shown_root: str) -> CifarFiles:
    """Look for a data set: `root` is an archive, or a folder with unpacked files or an archive.

    Args:
        root: where to look; folders below it are not searched.
        name: which data set.
        shown_root: how the parameters name `root`.

    Raises:
        ValueError: it is not there; names transfer_data.root and what is missing.
    """
    layouts = LAYOUTS[name]
    archives = " or ".join(layout.archive for layout in layouts)
    if root.is_file():
        for layout in layouts:
            if root.name == layout.archive:
                return CifarFiles(layout, root)
        raise ValueError(f"transfer_data.root: {shown_root} is a file, but not {archives}")
    absent: list[list[str]] = []
    for layout in layouts:
        absent.append([file for file in layout.files if not (root / file).is_file()])
        if not absent[-1]:
            return CifarFiles(layout, root)
    for layout in layouts:
        if (root / layout.archive).is_file():
            return CifarFiles(layout, root / layout.archive)
    if not root.exists():
        raise ValueError(
            f"transfer_data.root: {shown_root} does not exist; it may be {archives} or a folder "
            f"that holds one, packed or unpacked (from {HOMEPAGE}; nothing is downloaded)"
        )
    missing = min(absent, key=len)
    raise ValueError(
        f"transfer_data.root: {shown_root} lacks {', '.join(missing)}; put {archives} there, "
        f"packed or unpacked (from {HOMEPAGE}; nothing is downloaded)"
    )


def _read_members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Read members of a .tar.gz; read to its end, so that gzip's own checksum is compared."""
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                _check_member(path, member)
                if member.name not in wanted:
                    continue
                if member.name in contents:
                    raise ValueError(
                        f"{path}: holds {member.name} twice; fetch it again from {HOMEPAGE}"
                    )
                file = archive.extractfile(member)
                assert file is not None, "a plain file"
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


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Refuse what no official archive holds, although nothing would follow or write it."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        what = "points out of the archive"
    elif not (member.isfile() or member.isdir()):
        what = "is a link or a device"
    elif member.size > MAX_MEMBER_BYTES:
        what = f"has {member.size:,} bytes"
    else:
        return
    raise ValueError(
        f"{path}: {member.name!r} {what}, which no official archive's file does; "
        f"do not unpack it, fetch it from {HOMEPAGE}"
    )
