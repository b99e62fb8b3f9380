"""Helpers for files: atomic writing, damage, locks, hashes, and checks of free disk space."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from safetensors import SafetensorError

SPARE_BYTES = 50_000_000
"""Bytes that `check_free_space` leaves free for other files that a run writes."""

_TEMPORARY_NAME = re.compile(r"^\.(.+)\.(\d+)\.part$")
"""Name of a temporary file or folder: the final name and the id of the process."""


@contextmanager
def replace_file(path: Path) -> Generator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` if the block succeeds.

    Raises ValueError, with `path` and what to do, if the disk is full or the folder is read-only.
    """
    with explain_failed_write(path), _temporary(path) as temporary:
        yield temporary
        temporary.replace(path)


@contextmanager
def replace_dir(path: Path) -> Generator[Path]:
    """Yield a new, empty folder next to `path`; it replaces `path` if the block succeeds.

    Raises ValueError, with `path` and what to do, if the disk is full or the folder is read-only.
    """
    with explain_failed_write(path), _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)


@contextmanager
def _temporary(path: Path) -> Generator[Path]:
    """Yield a new path next to `path`, and delete what is there at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{os.getpid()}.part")
    # Also delete what killed processes left; one of them may have had the id of this process.
    for left in path.parent.iterdir():
        parts = _TEMPORARY_NAME.fullmatch(left.name)
        if left == own or (parts and parts[1] == path.name and not _is_alive(int(parts[2]))):
            _delete(left)
    try:
        yield own
    finally:
        _delete(own)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # the first error counts
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # A zombie has ended. In containers, nobody may wait for it, so that its number stays.
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] != b"Z"
    return True


@contextmanager
def explain_failed_write(path: Path) -> Generator[None]:
    """If the block cannot write `path`, raise a ValueError that names it and says what to do.

    Other errors of the block are raised as they are. An OSError that names no file gets the path.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The errors of safetensors and shutil.copytree have the number only in their text.
        found = re.search(r"(?:\(os error |\[Errno )(\d+)", str(error))
        number = int(found[1]) if found else 0
        # A folder inside `replace_dir` is shown under its final name.
        shown = Path(*(_TEMPORARY_NAME.sub(r"\1", part) for part in path.parts))
        again = "then run the same command again"
        if number in {errno.ENOSPC, errno.EDQUOT}:
            there = next(folder for folder in path.absolute().parents if folder.exists())
            free = describe_bytes(shutil.disk_usage(there).free)
            what = f"no space is left on the disk ({os.strerror(number)}; {free} are free)"
            remedy = f"Delete some files, {again}; complete results are kept"
            raise ValueError(f"{shown}: {what}. {remedy}") from error
        name = getattr(error, "filename", None)
        is_own = name is None or Path(name) in path.parents or path.parent in Path(name).parents
        if number == errno.EROFS or (number in {errno.EACCES, errno.EPERM} and is_own):
            what = f"it cannot be written ({os.strerror(number)})"
            raise ValueError(f"{shown}: {what}. Make {shown.parent} writable, {again}") from error
        if isinstance(error, OSError) and error.errno and name is None:
            what = f"it could not be written ({error.strerror})"
            raise ValueError(f"{shown}: {what}") from error
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; on another file system, or without links, copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def explain_damage(path: Path | str, *, remedy: str) -> Generator[None]:
    """If the block cannot read `path`, raise a ValueError that names the file and ends in `remedy`.

    Libraries raise errors of all kinds for damaged files. An error that names the file passes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{path}: no such file; {remedy}") from error
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kind = "" if isinstance(error, ValueError | OSError) else type(error).__name__
        reason = ": ".join(filter(None, (kind, " ".join(what.split())[:200])))
        fault = "cannot be read" if isinstance(error, OSError) else "damaged"
        raise ValueError(f"{path}: {fault} ({reason}); {remedy}") from error


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises the ValueError of `explain_damage` if that is not possible."""
    with explain_damage(path, remedy=remedy):
        content: object = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"expected a JSON object, found {type(content).__name__}")
        return content  # pyright: ignore[reportUnknownVariableType]


def load_tensors(path: Path, *, sha256: str, remedy: str) -> "dict[str, Tensor]":
    """Load a safetensors file.

    Raises ValueError if it is missing, has another SHA-256, or has values that are not finite.
    """
    from safetensors.torch import load_file

    with explain_damage(path, remedy=remedy):
        if (found := sha256_of(path)) != sha256:
            raise ValueError(f"its sha256 is {found}, but the file beside it says {sha256}")
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} has values that are not finite: the training diverged")
        return tensors


@contextmanager
def hold_lock(
    path: Path, *, shared: bool = False, on_wait: Callable[[str], None] | None = None
) -> Generator[None]:
    """Lock the file `path` during the block; a crash of the process also releases the lock.

    If another process has the lock, call `on_wait` with that process's id, then wait. An exception
    of `on_wait` ends the waiting. Several processes can have a `shared` lock, whose ids are not
    noted. The lock file is never deleted: two processes could then hold locks, on the deleted file
    and on a new file.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with explain_failed_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+b", buffering=0)  # else closing would write again on a full disk
    with opened as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if on_wait is not None:
                on_wait(file.read().decode().strip() or "(unknown)")
            fcntl.flock(file, kind)
        with explain_failed_write(path):
            file.truncate(0)
            file.write(b"" if shared else str(os.getpid()).encode())
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


def bytes_of(folder: Path, pattern: str) -> int:
    """Return the bytes of the files in a folder. Other processes may delete files meanwhile."""
    total = 0
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


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
