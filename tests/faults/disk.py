"""Run every stage on a full disk and with read-only outs; then run it again with room.

    python -m tests.faults disk                           all cases: about 10 minutes of one core
    python -m tests.faults disk --stages pretrain,score   only these stages
    python -m tests.faults disk --project <folder>        keep the finished project in a folder

The disk is a small tmpfs, which needs Linux and the right to make a mount namespace. It is full
from the start, or after a part of the stage's writes. Each stage must end with exit code 2 and a
message that names a path, without a traceback. The second run must give the outs of an undisturbed
run.
"""

from stages.runtime.tracking import connect

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.faults.forks import load_libraries, run_fork, run_stage
from tests.faults.hook.sitecustomize import DATABASE
from tests.faults.project import Project, log_of, read_options

CASES = ("full", "full later", "read-only")
_INSIDE = "FAULTS_INSIDE"


def main(arguments: Sequence[str]) -> None:
    """Run all cases in a mount namespace, print a table, exit with code 1 if a case failed."""
    options = read_options("disk", __doc__, arguments)
    if _INSIDE not in os.environ:  # the mounts then end with this program, whatever happens
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = ["unshare", "--mount", *as_root, sys.executable, "-m", "tests.faults", "disk"]
        os.execvpe(command[0], [*command, *arguments], os.environ | {_INSIDE: "1"})
    end = time.monotonic() + 60 * options.minutes
    wrong: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as top:
        finished = Project.open((options.project or Path(top) / "finished").absolute())
        size = 2 * sum(f.lstat().st_size for f in finished.folder.rglob("*")) + 100_000_000
        disk = Path(top) / "disk"
        disk.mkdir()
        mount("-t", "tmpfs", "-o", f"size={size}", "none", str(disk))
        load_libraries()
        (store := Path(top) / "store").mkdir()
        assert run_fork(store, partial(connect, store)) == 0, log_of(store).read_text()
        try:
            project = finished.copy(disk)  # whose log lies beside it, on another disk
            for stage in options.stages.split(","):
                for case in CASES if time.monotonic() < end else ():
                    started = time.monotonic()
                    wrong[stage, case] = fault = "; ".join(
                        run_case(project, stage, case, empty_store=store / DATABASE)
                    )
                    seconds = f"{time.monotonic() - started:.1f} s"
                    print(f"{stage}, {case}: {fault or 'ok'}, {seconds}", flush=True)
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    print(f"{sum(not fault for fault in wrong.values())} of {len(wrong)} cases are good")
    raise SystemExit(any(wrong.values()))


def run_case(project: Project, stage: str, case: str, *, empty_store: Path) -> Iterator[str]:
    """Run the stage without room, then with room; yield what is wrong."""
    project.forget(stage)
    if (stage, case) != ("pretrain", "full"):  # in which MLflow makes its tables
        shutil.copyfile(empty_store, project.folder / DATABASE)
    outs = [project.folder / name for name in project.outs[stage]]
    sizes = [len(content) for content in project.outs[stage].values()]
    (project.folder / ".work").mkdir()
    for out in outs:
        out.parent.mkdir(parents=True, exist_ok=True)
    ballast = project.folder / "ballast"
    places = [project.folder / "build", project.folder / "metrics"]
    if case == "read-only":
        if stage in {"track", "prepare"}:  # they also write elsewhere
            places = [project.folder]
        for place in places:
            mount("--bind", str(place), str(place))
            mount("-o", "remount,ro,bind", str(place))
    else:
        room = sum(sizes) // 2 if case == "full later" else 0
        fill(ballast, room=room)
    run = partial(run_fork, project.folder, partial(run_stage, stage))
    try:
        code = run()
    finally:
        for place in places if case == "read-only" else ():
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        ballast.unlink(missing_ok=True)
    said = log_of(project.folder).read_text().strip()
    message = said.splitlines()[-1] if said else ""
    named = re.search(r"(build|metrics|mlflow|mlruns|\.work|data|disk)[/.\w-]*", message)
    why = re.search(r"no space|stay free|Read-only|disk is full|readonly|not writable", message)
    if code != 2 or "Traceback" in said or not named or not why:
        yield f"exit code {code}: {said[-1500:]}"
    left = [path.name for path in project.folder.rglob("*.part")]
    if left:
        yield f"left: {left}"
    if run():
        yield f"the second run fails: {log_of(project.folder).read_text()[-1500:]}"
    yield from project.differences(stage)


def fill(ballast: Path, *, room: int) -> None:
    """Write a file that leaves `room` bytes of the disk."""
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(ballast.parent).free - room)


def mount(*arguments: str) -> None:
    """Mount a file system, seen only by this program and its children."""
    subprocess.run(["mount", *arguments], check=True)
