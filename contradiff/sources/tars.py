"""Tar archives read where they lie: what is in them, where it is, and whether they are official.

Nothing is unpacked. To list a tar only headers are read, so one of 138 GB costs what its
1.28 million headers cost; the list is kept for the next time.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from contradiff.files import replace_file

NUM_SAMPLED_BLOCKS = 64
SAMPLED_BLOCK = 4096


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes lie in the outermost file."""

    name: str
    offset: int
    num_bytes: int


Members = dict[str, list[Member]]
"""By class, or whatever else groups them."""


def walk_tar(path: Path, *, inner: tarfile.TarInfo | None = None) -> list[tarfile.TarInfo]:
    """Return the plain files of a tar, in its order.

    Args:
        path: the tar.
        inner: a tar in this tar, which is walked instead. Its members' `offset_data` then count
            from its own beginning.

    Raises:
        ValueError: the tar is truncated or damaged, or `check_member` refuses a member.
    """
    shown = f"data.root: {path}" if inner is None else f"data.root: {path}: {inner.name}"
    with path.open("rb", buffering=0) as file:
        try:
            members = _members(file, inner)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{shown} is no tar archive, or is truncated or damaged ({error}): fetch it again"
            ) from error
    for member in members:
        check_member(member, shown=shown)
    return [member for member in members if member.isreg()]


def _members(file: Any, inner: tarfile.TarInfo | None) -> list[tarfile.TarInfo]:
    if inner is not None:
        bounded = cast("BufferedReader", tarfile.TarFile(fileobj=file).extractfile(inner))
        file = bounded.raw  # without the buffer: only headers are wanted
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = list(tar)
        # tarfile stops without a word at a damaged header, or where the file ends too early.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
        return members


def check_member(member: tarfile.TarInfo, *, shown: str) -> None:
    """Refuse what no official archive holds, although nothing would follow or write it.

    Raises:
        ValueError: the member is a link or a device, or would lead out of the archive.
    """
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        fault = "points out of the archive"
    elif not (member.isdir() or member.isreg()) or member.issparse():
        fault = "is a link or a device"
    else:
        return
    raise ValueError(
        f"{shown}: {member.name!r} {fault}, which no official archive's file does; do not unpack "
        "it, fetch it again"
    )


def kept_index(path: Path, folder: Path | None, make: Callable[[], Members]) -> Members:
    """Return the members of a tar that `make` finds; read them from `folder` next time.

    They are found anew when the tar's size, its time of change or a sampled block has changed, or
    when the cached file is damaged. Without a folder nothing is kept.
    """
    if folder is None:
        return make()
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    note = folder / f"{path.name}-{place}.json"
    identity = f"{path.stat().st_mtime_ns} {sampled_digest(path)}"
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        if content["identity"] == identity:
            return {name: [Member(*m) for m in group] for name, group in content["groups"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no index yet, or a damaged one
    groups = make()
    with replace_file(note) as temporary:
        temporary.write_text(json.dumps({"identity": identity, "groups": groups}))
    return groups


def sampled_digest(path: Path) -> str:
    """Hash a file's size and evenly spread blocks, including the first and the last."""
    num_bytes = path.stat().st_size
    hasher = hashlib.sha256(f"{num_bytes}\n".encode())
    last = max(0, num_bytes - SAMPLED_BLOCK)
    with path.open("rb", buffering=0) as file:
        for number in range(NUM_SAMPLED_BLOCKS):
            place = last * number // (NUM_SAMPLED_BLOCKS - 1)
            hasher.update(os.pread(file.fileno(), SAMPLED_BLOCK, place))
    return hasher.hexdigest()


def check_digest(path: Path, *, algorithm: str, expected: str, remedy: str) -> None:
    """Compare a file's digest with the published one. This reads every byte.

    Raises:
        ValueError: it differs; names the file, both digests and the remedy.
    """
    with path.open("rb") as file:
        hasher = hashlib.new(algorithm, usedforsecurity=False)
        found = hashlib.file_digest(file, lambda: hasher).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path}: not the official {path.name}: its {algorithm} is {found}, expected "
            f"{expected}; {remedy}"
        )
