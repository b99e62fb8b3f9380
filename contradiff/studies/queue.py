"""DVC's queue of experiments: what waits, runs or failed; adding members; starting workers.

`dvc queue status` knows names only. A member is known by its parameters, so this module reads the
commits that DVC keeps for waiting tasks, and the notes of its workers in .dvc/tmp/exps/run.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contradiff.studies.experiments import environment, git, parse_yaml, read_blobs
from contradiff.studies.members import Member, digest_of

_STASH = "refs/exps/celery/stash"
_NOTES = Path(".dvc/tmp/exps/run")
_FAILED = 4
"""DVC's number for the status of a failed task."""
_SECONDS_TO_START = 90.0
_MAX_STARTS = 5


@dataclass(frozen=True)
class Task:
    """A task of DVC's queue. `log` is the file with its output."""

    name: str
    state: Literal["queued", "running", "lost", "failed", "done"]
    digest: str
    log: Path


def list_tasks(root: Path) -> list[Task]:
    """Return the tasks of DVC's queue: those that wait, in their order, then those that began.

    A task is lost if its process ended without a result: the machine or the worker was killed.
    """
    if not (root / ".git").exists():
        return []
    waiting: list[tuple[str, str, Literal["queued"]]] = []
    log = git(root, "log", "-g", "--format=%H %gs", _STASH, "--", check=False).decode()
    for line in reversed(log.splitlines()):
        revision, _, subject = line.partition(" ")
        waiting.append((revision, subject.split(":")[-1], "queued"))
    began = [(note.parent.name, *_fate(note)) for note in sorted((root / _NOTES).glob("*/*.json"))]
    every = [*waiting, *began]
    texts = read_blobs(root, [f"{revision}:params.yaml" for revision, *_ in every])
    return [
        Task(name, state, digest_of(parse_yaml(text)) if text else "", _log(root, revision))
        for (revision, name, state), text in zip(every, texts, strict=True)
    ]


def _log(root: Path, revision: str) -> Path:
    return (root / _NOTES / revision / f"{revision}.out").relative_to(root)


def _fate(note: Path) -> tuple[str, Literal["running", "lost", "failed", "done"]]:
    """Return a task's name, and what became of its process."""
    try:
        process: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        info: dict[str, Any] = json.loads(note.with_suffix(".run").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # DVC writes these files at this moment
        return note.parent.name[:7], "running"
    name = str(info.get("name") or note.parent.name[:7])
    if process.get("returncode") is None:
        is_alive = _is_task(int(process["pid"]), note.parent.name)
        return name, "running" if is_alive else "lost"
    has_failed = process["returncode"] != 0 or info.get("status") == _FAILED
    return name, "failed" if has_failed or not info.get("result_hash") else "done"


def _is_task(pid: int, revision: str) -> bool:
    """Whether a process is the one that runs a task: numbers of processes are used again."""
    command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return revision in done.stdout


def command_of(member: Member, targets: Sequence[str], *options: str) -> list[str]:
    """Return the command that queues a member (`--queue`) or runs it."""
    return ["dvc", "exp", "run", *options, "-n", member.name, *member.options, *targets]


def add_to_queue(
    root: Path,
    members: Sequence[Member],
    targets: Sequence[str],
    *,
    say: Callable[[str], None],
) -> None:
    """Queue members; raises ValueError, with DVC's message, if DVC refuses one.

    Members that are in the queue are left out: a caller that looks while a worker takes a task sees
    it neither in the queue nor at work.
    """
    names = git(root, "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps").decode()
    taken = set(names.split())
    present = [task for task in list_tasks(root) if task.state in ("queued", "running")]
    taken |= {task.name for task in present}
    digests = {task.digest for task in present}
    for member in (each for each in members if each.digest not in digests):
        name, number = member.name, 2
        while name in taken:  # an unfinished experiment, or one with other parameters
            name, number = f"{member.name}-{number}", number + 1
        taken.add(name)
        named = Member(name, member.changes, member.seed, member.params)
        call(root, *command_of(named, targets, "--queue", "-q"))
        say(f"queued {name}")


def call(root: Path, *command: str) -> str:
    """Run DVC; return what it prints, or raise ValueError with its message."""
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise ValueError("DVC is not installed; type `pip install -e '.[pipeline]'`") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ValueError(f"{' '.join(command)}: {said[-2000:]}")
    return done.stdout


def find_gpus(device: str) -> list[str]:
    """Return the GPUs that workers may use, as CUDA_VISIBLE_DEVICES names them; [] for the CPU."""
    if device == "cpu":
        return []
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def environments(num_workers: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Return each worker's environment: its share of the GPUs, or one thread of the CPU.

    With more workers than GPUs, workers take turns in sharing a GPU.
    """
    if not gpus:
        names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"
        return [dict.fromkeys(names, "1")] * num_workers
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[k::num_workers] or [gpus[k % len(gpus)]])}
        for k in range(num_workers)
    ]


def start_workers(root: Path, num_workers: int, gpus: Sequence[str]) -> None:
    """Start DVC's workers, which go on if this program ends. Those that run already stay.

    `dvc queue start -j 2` adds one worker to one that runs, so each gets its own environment.
    """
    every = environments(num_workers, gpus)
    if len({str(each) for each in every}) == 1:
        _start(root, num_workers, every[0])
        return
    for number, each in enumerate(every, start=1):
        _start(root, number, each)
        limit = time.monotonic() + _SECONDS_TO_START
        while number < num_workers and _num_workers(root) < number:
            if time.monotonic() > limit:
                where = _NOTES.parent / "celery"
                raise ValueError(f"DVC's worker {number} does not start; see {where}")
            time.sleep(1)


def _start(root: Path, count: int, variables: Mapping[str, str]) -> None:
    log = root / ".work/studies/queue.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["dvc", "queue", "start", "-j", str(count)]
    with log.open("a", encoding="utf-8") as file:  # workers keep it open: a pipe would never end
        done = subprocess.run(
            command,
            cwd=root,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            check=False,
        )
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed; see {log.relative_to(root)}")


def _num_workers(root: Path) -> int:
    found = re.search(r"(\d+) active, (\d+) idle", call(root, "dvc", "queue", "status"))
    return int(found[1]) + int(found[2]) if found else 0


def forget_lost(root: Path, members: Sequence[Member]) -> None:
    """Let DVC mark the members' lost tasks as failed, so that it does not call them running."""
    digests = {member.digest for member in members}
    for task in list_tasks(root):
        if task.state == "lost" and task.digest in digests:
            # DVC fails if it knows already.
            with suppress(ValueError):
                call(root, "dvc", "queue", "kill", task.name)


def wait_for(
    root: Path,
    members: Sequence[Member],
    *,
    num_workers: int,
    start: Callable[[], None],
    say: Callable[[str], None],
    seconds: float = 5.0,
) -> None:
    """Wait until all `members`, which are in DVC's queue or at work, have ended; say how.

    A member that a worker is taking is for some seconds neither in the queue nor at work, so the
    waiting goes on a while without it. Lost members end it: the caller looks what is still missing.
    DVC's workers can die, because their transport, kombu's file system, reads messages that are not
    yet complete. So `start` is called if members wait although fewer than `num_workers` tasks have
    run for a while. Raises ValueError if nothing runs then either.
    """
    digests = {member.digest for member in members}
    told = {task.log for task in list_tasks(root) if task.state not in ("queued", "running")}
    busy_at = seen_at = time.monotonic()
    starts, unfinished = 0, set(digests)
    while True:
        every = list_tasks(root)
        tasks = [task for task in every if task.digest in digests]
        ended = [task for task in tasks if task.state not in ("queued", "running")]
        for task in ended:
            if task.log not in told:
                told.add(task.log)
                unfinished.discard(task.digest)
                where = "" if task.state == "done" else f", see {task.log}"
                say(f"{task.name}: {task.state}{where}")
        if any(task.state in ("queued", "running") for task in tasks):
            seen_at = time.monotonic()
        elif not unfinished or time.monotonic() - seen_at > _SECONDS_TO_START:
            return
        num_running = sum(task.state == "running" for task in every)
        num_waiting = sum(task.state == "queued" for task in tasks)
        if num_running:
            starts = 0
        if num_running >= num_workers or not num_waiting:
            busy_at = time.monotonic()
        elif time.monotonic() - busy_at >= _SECONDS_TO_START:
            if starts == _MAX_STARTS:
                remedy = "type `dvc queue stop --kill`, `dvc queue remove --queued`"
                raise ValueError(
                    f"DVC's queue: {num_waiting} members wait, but no worker takes them; {remedy}, "
                    f"and the same command again (the workers' logs are in {_NOTES.parent}/celery)"
                )
            say(f"{num_waiting} members wait, and {num_running} of {num_workers} workers work")
            start()
            busy_at, starts = time.monotonic(), starts + 1
        time.sleep(seconds)
