"""Names and prepares the work folder, where a stage keeps unfinished work for the next run.

The name depends on the stage, its parameters and the content of its inputs, but not on the code. So
a training can continue after a small change of the code. If the change makes old unfinished work
unusable, the stage gets a new `state_version`, and the old work is deleted.

If DVC runs the stage, finished work stays until the stage `track`, because DVC can be killed before
it has recorded the result. The next run takes finished work over, if the code is still the same.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel

from contradiff.files import hold_lock, read_json, replace_file, sha256_of
from contradiff.processes import Part

NOTE_NAME = "begun.json"
_CODE = Path(__file__).resolve().parents[2]


def take_up(
    folder: Path, *, state_version: int, code: str | None, log: Callable[[str], None]
) -> bool:
    """Prepare a work folder: empty it if the work in it cannot be used; return if it can be.

    Work of another `state_version` cannot be used. Finished work is used only if its code had the
    digest `code`.
    """
    note, commit = folder / NOTE_NAME, revision() or "no commit"
    begun = _read_note(folder) if note.is_file() else None
    if begun is not None and begun.get("state_version") != state_version:
        log(
            f"starting again: the unfinished work has version {begun.get('state_version')}, but "
            f"this code needs version {state_version}"
        )
    elif begun is not None and (finished := begun.get("finished")):
        if finished["code"] == code:
            what = f"process {finished['pid']} has finished the same work; taking its result over"
            log(f"{what} (to compute it again, delete {folder})")
            return True
    elif begun is not None:
        if begun.get("commit") != commit:
            log(f"resuming work that commit {begun.get('commit')} began; the code is now {commit}")
        return True
    if begun is not None:
        shutil.rmtree(folder, ignore_errors=True)
    _write_note(folder, {"state_version": state_version, "commit": commit})
    return False


@contextmanager
def hold_part(folder: Path, lock: Path, *, part: Part, state_version: int) -> Generator[None]:
    """Hold the locks of a part of the work during the block. Other parts can be at work too.

    The parts share the folder's lock, so that a run of the whole work waits for all of them. Raises
    ValueError if such a run or the same part is at work, or if the folder has work that cannot be
    continued: other parts may use the folder, so it is not emptied.
    """

    def refuse(pid: str) -> NoReturn:
        raise ValueError(f"{folder}: process {pid} is already doing the work of part {part}")

    own = lock.with_name(f"{lock.name}-{part}")
    with (
        hold_lock(lock, shared=True, on_wait=refuse),
        hold_lock(own, on_wait=refuse),
    ):
        with hold_lock(lock.with_name(f"{lock.name}-begin")):
            begun = _read_note(folder) if (folder / NOTE_NAME).is_file() else None
            if begun is None:
                commit = revision() or "no commit"
                _write_note(folder, {"state_version": state_version, "commit": commit})
            elif begun.get("finished") or begun.get("state_version") != state_version:
                what = "finished" if begun.get("finished") else "begun by code of another version"
                remedy = "delete the folder to compute it again"
                raise ValueError(f"{folder}: this work is {what}; {remedy}")
        yield


def finish(folder: Path, *, code: str) -> None:
    """Note that the work in a work folder is finished, and the digest of the code that did it."""
    begun = _read_note(folder)
    _write_note(folder, begun | {"finished": {"pid": os.getpid(), "code": code}})


def delete_finished(root: Path) -> None:
    """Delete the finished work of all stages, except work that a process is taking over now."""

    def skip(_pid: str) -> None:
        raise BlockingIOError

    for note in root.glob(f".work/*/*/{NOTE_NAME}"):
        lock = lock_of(root, *note.parts[-3:-1])
        with suppress(BlockingIOError), hold_lock(lock, on_wait=skip):
            if note.is_file() and "finished" in _read_note(note.parent):
                shutil.rmtree(note.parent, ignore_errors=True)


def lock_of(root: Path, stage: str, key: str) -> Path:
    """Return the file that a process locks while it uses the work folder of a stage and a key."""
    return root / ".work/locks" / f"{stage}-{key}"


def code_digest() -> str:
    """Return a hash of all Python files of the stages and the library."""
    files = (file for room in ("contradiff", "stages") for file in (_CODE / room).rglob("*.py"))
    lines = (f"{file.relative_to(_CODE)} {sha256_of(file)}\n" for file in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_note(folder: Path) -> dict[str, Any]:
    remedy = f"delete the folder {folder} to start this work again"
    return read_json(folder / NOTE_NAME, remedy=remedy)


def _write_note(folder: Path, content: Mapping[str, Any]) -> None:
    with replace_file(folder / NOTE_NAME) as path:
        path.write_text(json.dumps(content), encoding="utf-8")


def revision(*, short: bool = False) -> str | None:
    """Return the current commit, with `-dirty` if files have changed since; None without git."""
    command = ["git", "describe", "--always", "--abbrev=" + ("7" if short else "40")]
    try:
        done = subprocess.run(
            [*command, "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def key_of(stage: str, *, params: Mapping[str, object] | BaseModel, inputs: Sequence[Path]) -> str:
    """Return 16 hexadecimal digits, which name the work folder of a stage.

    The digits depend on the stage, its parameters and the content of its input files. Raises
    FileNotFoundError if an input is missing.
    """
    hashes: dict[str, dict[str, str]] = {}
    for path in inputs:
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        hashes[str(path)] = {str(file.relative_to(path)): sha256_of(file) for file in files}

    def plain(value: object) -> object:
        is_section = isinstance(value, BaseModel)
        return value.model_dump(mode="json", by_alias=True) if is_section else str(value)

    content = {"stage": stage, "params": params, "inputs": hashes}
    text = json.dumps(content, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
