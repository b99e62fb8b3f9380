"""Where the files in a tar lie, read from its headers alone and kept for the next time.

Nothing is unpacked. Only headers are read, 512 bytes a member, so that a tar of 138 GB costs what
its 1.28 million headers cost.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from contradiff.files import replace_file

BLOCK = tarfile.BLOCKSIZE
NUM_SAMPLED_BLOCKS = 64
SAMPLED_BLOCK = 4096
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_HEADERS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, and where its bytes lie in the outermost file."""

    name: str
    offset: int
    num_bytes: int


def walk_tar(descriptor: int, *, start: int, end: int, shown: str) -> Iterator[Member]:
    """Yield the plain files of a tar in its order; folders are passed over.

    Names may be long (GNU and pax). The offsets count from the beginning of `descriptor`'s file.

    Args:
        descriptor: an open file; its position is neither used nor moved.
        start: where the tar begins in it; not 0 for a tar in a tar.
        end: where the tar ends.
        shown: its name in messages.

    Raises:
        ValueError: the tar is truncated or damaged, or has a member that no archive of images
            needs: an absolute path, a `..`, a link or a device.
    """
    position, long_name = start, ""
    while True:
        block = os.pread(descriptor, max(0, min(BLOCK, end - position)), position)
        if block.count(0) == BLOCK:
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(
                f"data.root: {_fault(block, start, position, shown)} ({error})"
            ) from error
        offset = position + BLOCK
        position = offset + -(-header.size // BLOCK) * BLOCK
        if offset + header.size > end:
            raise ValueError(
                f"data.root: {shown} is truncated: its {header.name} ends at byte "
                f"{offset + header.size - start} of {end - start}"
            )
        if header.type in (*_LONG_NAMES, *_PAX_HEADERS, tarfile.XGLTYPE):
            content = os.pread(descriptor, header.size, offset)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type in _PAX_HEADERS:
                long_name = _pax_path(content, shown=shown)
            continue
        name = long_name or header.name
        long_name = ""
        check_member(name, is_link=header.issym() or header.islnk(), shown=shown)
        if header.isdir():
            continue
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            raise ValueError(
                f"data.root: {shown}: {name} is no plain file (tar type {header.type!r})"
            )
        yield Member(name, offset, header.size)


def check_member(name: str, *, is_link: bool, shown: str) -> None:
    """Refuse a member whose name or kind would lead out of the tar, were it unpacked.

    Raises:
        ValueError: names the member.
    """
    path = PurePosixPath(name) if "/" in name or ".." in name else None
    fault = (
        "is a link"
        if is_link
        else "has an absolute path"
        if path is not None and path.is_absolute()
        else "has `..` in its path"
        if path is not None and ".." in path.parts
        else ""
    )
    if fault:
        raise ValueError(
            f"data.root: {shown}: {name} {fault}; ILSVRC's archives have none: fetch it anew"
        )


def _fault(block: bytes, start: int, position: int, shown: str) -> str:
    if len(block) < BLOCK:
        return f"{shown} is truncated at byte {position - start}"
    if position == start:
        return f"{shown} is no tar archive"
    return f"{shown} is damaged at byte {position - start}"


def _pax_path(content: bytes, *, shown: str) -> str:
    """The `path` among records such as `19 path=train/a.jpg` and a line feed; empty if none."""
    rest = content
    while rest:
        length, _, _ = rest.partition(b" ")
        record = rest[: int(length)] if length.isdigit() else b""
        keyword, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals:
            raise ValueError(f"data.root: {shown} is damaged: a pax header that is none")
        if keyword == b"path":
            return value.decode("utf-8", "surrogateescape")
        if keyword == b"size":
            raise ValueError(f"data.root: {shown}: a member of more than 8 GB, which is no image")
        rest = rest[len(record) :]
    return ""


def sampled_digest(path: Path) -> str:
    """Hash a file's size and evenly spread blocks of it, the first and the last among them."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        hasher.update(f"{num_bytes}\n".encode())
        last = max(0, num_bytes - SAMPLED_BLOCK)
        for number in range(NUM_SAMPLED_BLOCKS):
            place = last * number // (NUM_SAMPLED_BLOCKS - 1)
            hasher.update(os.pread(file.fileno(), SAMPLED_BLOCK, place))
    return hasher.hexdigest()


def identity_of(path: Path) -> str:
    """What an index of `path` is good for: this size, this time of change, these sampled blocks."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {sampled_digest(path)}"


def load_index(cache: Path | None, identity: str) -> dict[str, list[Member]] | None:
    """Return the groups of members that `store_index` has kept for this file, if it did.

    A file that is no such index is as good as none: it is written anew.
    """
    if cache is None or not cache.is_file():
        return None
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["identity"] != identity:
            return None
        return {
            group: [Member(*entry) for entry in zip(*columns, strict=True)]
            for group, columns in content["groups"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def store_index(
    cache: Path | None, identity: str, groups: dict[str, Sequence[Member]] | dict[str, list[Member]]
) -> None:
    """Keep groups of members for the next time, by columns: names, offsets, sizes."""
    if cache is None:
        return
    content = {
        "identity": identity,
        "groups": {
            group: [
                [member.name for member in members],
                [member.offset for member in members],
                [member.num_bytes for member in members],
            ]
            for group, members in groups.items()
        },
    }
    with replace_file(cache) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
