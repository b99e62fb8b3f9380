"""Where an interrupted stage finds its own work again, and never another's.

The folder's name depends on what decides the result: the stage, its parameters and the content of
its inputs. The code is left out, so that a training survives a corrected comment; unfinished work
of another STATE_VERSION begins anew. A note names the commit that began the work.
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
    """Empty a work folder if its state has another version; say so, and which commit began it."""
    note, commit = folder / NOTE_NAME, revision() or "no commit"
    begun = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    if begun is not None and begun["state_version"] == state_version:
        if begun["commit"] != commit:
            log(f"resuming work that commit {begun['commit']} began; this is {commit}")
        return
    if begun is not None:
        log(
            f"beginning anew: the unfinished work has STATE_VERSION {begun['state_version']}, and "
            f"this code saves version {state_version}"
        )
        shutil.rmtree(folder, ignore_errors=True)
    with replace_file(note) as path:
        path.write_text(json.dumps({"state_version": state_version, "commit": commit}))


def revision(*, short: bool = False) -> str | None:
    """Return git's revision, with `-dirty` if files differ from it; None without git."""
    command = ["git", "describe", "--always", "--abbrev=" + ("7" if short else "40")]
    try:
        done = subprocess.run(
            [*command, "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def key_of(stage: str, *, params: Mapping[str, object] | BaseModel, inputs: Sequence[Path]) -> str:
    """Return 16 hexadecimal digits that change with everything that decides a stage's result.

    Whole files are hashed, because latents of other crops have the same sizes. An input that does
    not exist raises FileNotFoundError.
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
