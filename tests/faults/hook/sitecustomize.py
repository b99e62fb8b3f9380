"""Python loads this file at its start, if its folder is in PYTHONPATH. It makes a stage fail.

A write of a stage ends with a rename: of a temporary file or folder to its final name. Python
announces each rename to audit hooks, so a hook can note all writes of a stage, or kill the stage at
one of them. The stages need no code for this.

FAULTS_WRITES=<file>    note the names of all writes in the file, as "<stage> <name>"
FAULTS_KILL="<stage> <name> <when> <whom>"    SIGKILL at the first write of this name
    <when>: before (nothing is written yet), middle (half of the file is written) or after
    <whom>: stage, dvc (its parent, alone) or group (both)
FAULTS_PID=<file>       note the stage's process id in the file before the kill
"""

import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

PART = re.compile(r"\.([^/]+)\.\d+\.part(?=/|$)")
ROOT = Path.cwd()


def name_of(path: Path) -> str | None:
    """Return the name of a write in the project, with final names of the folders around it."""
    full = path.resolve()
    return PART.sub(r"\1", str(full.relative_to(ROOT))) if full.is_relative_to(ROOT) else None


def spoil(part: Path, when: str) -> None:
    """Leave of a temporary file or folder what a kill would leave at this time."""
    files = sorted(f for f in part.rglob("*") if f.is_file()) if part.is_dir() else [part]
    if when == "before":
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    elif files:
        shutil.copyfile(files[-1], half := files[-1].with_name("half"))  # it may be a link
        os.truncate(half, half.stat().st_size // 2)
        half.replace(files[-1])


def install(stage: str) -> None:
    """Watch the renames of this process, which runs `stage`."""
    writes = os.environ.get("FAULTS_WRITES")
    wanted = os.environ.get("FAULTS_KILL", "").split(" ")
    is_busy = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_busy, wanted
        if event != "os.rename" or is_busy or not PART.search(os.fsdecode(arguments[0])):
            return
        is_busy = True
        part, final = (Path(os.fsdecode(path)) for path in arguments[:2])
        name = name_of(final)
        if writes and name:
            with Path(writes).open("a", encoding="utf-8") as file:
                file.write(f"{stage} {name}\n")
        if wanted[:2] == [stage, name]:
            _, _, when, whom = wanted
            wanted = []
            if pid := os.environ.get("FAULTS_PID"):
                Path(pid).write_text(str(os.getpid()))
            if whom != "dvc" and when != "after":
                spoil(part, when)
            elif when == "after":
                part.rename(final)
            if whom == "stage":
                os.kill(os.getpid(), signal.SIGKILL)
            # The matrix has started DVC as the leader of the process group.
            (os.killpg if whom == "group" else os.kill)(os.getpgid(0), signal.SIGKILL)
        is_busy = False

    sys.addaudithook(watch)


if "-m" in sys.orig_argv:
    install(sys.orig_argv[sys.orig_argv.index("-m") + 1].removeprefix("stages."))
