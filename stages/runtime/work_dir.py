"""Names and prepares the work folder, where a stage keeps unfinished work for the next run.

The name depends on the stage, its parameters and the content of its inputs, but not on the code. So
a training can continue after a small change of the code. If the change makes old unfinished work
unusable, the stage gets a new `state_version`, and the old work is deleted.
"""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from contradiff.files import replace_file, sha256_of

NOTE_NAME = "begun.json"


def take_up(folder: Path, *, state_version: int, log: Callable[[str], None]) -> None:
    """Prepare a work folder: empty the folder if another `state_version` wrote it."""
    note, commit = folder / NOTE_NAME, revision() or "no commit"
    begun = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    if begun is not None and begun["state_version"] == state_version:
        if begun["commit"] != commit:
            log(f"resuming work that commit {begun['commit']} began; the code is now {commit}")
        return
    if begun is not None:
        log(
            f"starting again: the unfinished work has version {begun['state_version']}, but this "
            f"code needs version {state_version}"
        )
        shutil.rmtree(folder, ignore_errors=True)
    with replace_file(note) as path:
        path.write_text(json.dumps({"state_version": state_version, "commit": commit}))


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
