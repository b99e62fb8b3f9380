"""Helpers for files: atomic writing, locks, hashes, and checks of free disk space."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SPARE_BYTES = 50_000_000
"""Bytes that `check_free_space` leaves free for other files that a run writes."""


@contextmanager
def replace_file(path: Path) -> Generator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_dir(path: Path) -> Generator[Path]:
    """Yield a new, empty folder next to `path`; it replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def hold_lock(path: Path, *, on_wait: Callable[[str], None] | None = None) -> Generator[None]:
    """Lock the file `path` during the block; a crash of the process also releases the lock.

    If another process has the lock, call `on_wait` with that process's id, then wait. The lock file
    is never deleted: two processes could then hold locks, on the deleted file and on a new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if on_wait is not None:
                on_wait(file.read().strip() or "(unknown)")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_manifest(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return a dict from each file's name to its size and SHA-256."""
    return {
        name: {"num_bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in sorted(names)
    }


def weights_manifest(key: str, given: str | None, root: Path, remedy: str) -> dict[str, Any]:
    """Return path, size and SHA-256 of the weights file `given`, or {} if `given` is None.

    Raises ValueError if the file is missing. The message begins with `key` and ends with `remedy`.
    """
    if given is None:
        return {}
    path = root / given
    if not path.is_file():
        raise ValueError(f"{key}: no file {given}; {remedy}")
    return {"path": given, "files": file_manifest(path.parent, [path.name])}


def describe_bytes(num_bytes: int) -> str:
    """Return a size in decimal units, such as "1.5 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def check_free_space(folder: Path, num_bytes: int, *, ways_out: str = "") -> None:
    """Raise ValueError if `num_bytes` do not fit on the disk. The message ends with `ways_out`."""
    free = shutil.disk_usage(folder).free
    lacking = num_bytes + SPARE_BYTES - free
    if num_bytes > 0 and lacking > 0:
        remedy = f"free {describe_bytes(lacking)} more, or put the project on a larger disk"
        raise ValueError(
            f"{folder.resolve()}: {describe_bytes(num_bytes)} are to be written, but only "
            f"{describe_bytes(free)} are free, and {describe_bytes(SPARE_BYTES)} must stay free; "
            f"{remedy}{f', or {ways_out}' if ways_out else ''}"
        )


@contextmanager
def explain_full_disk(folder: Path) -> Generator[None]:
    """If the block fails because the disk is full, raise a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise ValueError(
            f"{folder}: no space is left on the disk ({error.strerror}; "
            f"{describe_bytes(shutil.disk_usage(folder).free)} are free). Delete some files, then "
            "run the same command again; complete results are kept"
        ) from error
