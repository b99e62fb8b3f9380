"""List the files of tar archives without unpacking them, and compare official checksums.

Only the headers of a tar are read. The list can be kept in a file for the next run.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from contradiff.files import replace_file

NUM_SAMPLED_BLOCKS, SAMPLED_BLOCK = 64, 4096


class Member(NamedTuple):
    """A file in a tar. `offset` is the position of its first byte in the outermost tar."""

    name: str
    offset: int
    num_bytes: int


Members = dict[str, list[Member]]  # class or split => its files


def walk_tar(path: Path, *, inner: tarfile.TarInfo | None = None) -> list[tarfile.TarInfo]:
    """List the regular files of a tar, or of the tar `inner` inside it, in archive order.

    With `inner`, `offset_data` of a file counts from the start of the inner tar. Raises ValueError
    if the tar is truncated or damaged, or if `check_member` refuses a file.
    """
    shown = f"data.root: {path}" if inner is None else f"data.root: {path}: {inner.name}"
    with path.open("rb", buffering=0) as outer:
        file: Any = outer
        try:
            if inner is not None:
                bounded: Any = tarfile.TarFile(fileobj=outer).extractfile(inner)
                file = bounded.raw  # no buffer, since only headers are read
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = list(tar)
                # tarfile does not report a damaged header or a file that ends too early.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no header at byte {tar.offset}")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            fault = f"is not a tar archive, or is truncated or damaged ({error})"
            raise ValueError(f"{shown} {fault}: fetch it again") from error
    for member in members:
        check_member(member, shown=shown)
    return [member for member in members if member.isreg()]


def check_member(member: tarfile.TarInfo, *, shown: str) -> None:
    """Raise ValueError if a member is a link or a device, or its path leads out of the archive."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        fault = "points out of the archive"
    elif not (member.isdir() or member.isreg()) or member.issparse():
        fault = "is a link or a device"
    else:
        return
    remedy = "so this archive is not official; do not unpack it, fetch it again"
    raise ValueError(f"{shown}: {member.name!r} {fault}, {remedy}")


def kept_index(path: Path, folder: Path | None, read_headers: Callable[[Path], Members]) -> Members:
    """Return the list that `read_headers` makes of a tar. Keep the list in `folder` for later runs.

    The headers are read again if the tar has changed, or if `folder` is None.
    """
    if folder is None:
        return read_headers(path)
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    note = folder / f"{path.name}-{place}.json"
    identity = f"{path.stat().st_mtime_ns} {sampled_digest(path)}"
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        if content["identity"] == identity:
            return {name: [Member(*m) for m in group] for name, group in content["groups"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # no index yet, or a damaged one
    groups = read_headers(path)
    with replace_file(note) as temporary:
        temporary.write_text(json.dumps({"identity": identity, "groups": groups}))
    return groups


def sampled_digest(path: Path) -> str:
    """Hash a file's size and 64 evenly spaced blocks, which include the first and the last."""
    num_bytes = path.stat().st_size
    hasher = hashlib.sha256(f"{num_bytes}\n".encode())
    last = max(0, num_bytes - SAMPLED_BLOCK)
    with path.open("rb", buffering=0) as file:
        for number in range(NUM_SAMPLED_BLOCKS):
            place = last * number // (NUM_SAMPLED_BLOCKS - 1)
            hasher.update(os.pread(file.fileno(), SAMPLED_BLOCK, place))
    return hasher.hexdigest()


def check_digest(path: Path, algorithm: str, expected: str, *, remedy: str) -> None:
    """Raise ValueError if a file's digest is not `expected`. The message ends with `remedy`."""
    with path.open("rb") as file:
        hasher = hashlib.new(algorithm, usedforsecurity=False)
        found = hashlib.file_digest(file, lambda: hasher).hexdigest()
    if found != expected:
        fault = f"its {algorithm} is {found}, expected {expected}"
        raise ValueError(f"{path}: this is not the official {path.name}: {fault}; {remedy}")
