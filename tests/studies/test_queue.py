"""DVC's queue as its files show it, and what workers get."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contradiff.studies import queue
from contradiff.studies.members import digest_of, members_of
from contradiff.studies.queue import environments, find_gpus, list_tasks, wait_for
from contradiff.studies.slurm import script_of
from contradiff.studies.study import read_study
from tests.studies.project import PARAMS, add_experiment, git, params


def note(project: Path, name: str, *, pid: int = 1, code: int | None = None, **info: Any) -> str:
    """Write what DVC notes about a task that has begun; return its commit."""
    number = len(list((project / ".dvc/tmp/exps/run").glob("*")))  # another commit for each
    commit = add_experiment(project, "stash", params(probe={"lr": number}))
    git(project, "update-ref", "-d", f"refs/exps/{_head(project)}/stash")
    folder = project / ".dvc/tmp/exps/run" / commit
    folder.mkdir(parents=True)
    process = {"pid": pid, "returncode": code}
    (folder / f"{commit}.json").write_text(json.dumps(process))
    (folder / f"{commit}.run").write_text(json.dumps({"name": name, **info}))
    (folder / f"{commit}.out").touch()
    return commit


def _head(project: Path) -> str:
    head = git(project, "rev-parse", "HEAD")
    return f"{head[:2]}/{head[2:]}"


def test_tasks_are_known_by_their_parameters(project: Path):
    content = params(seed=5)
    commit = add_experiment(project, "waits", content)
    message = f"commit: dvc-exp:{commit}:{commit}:waits"
    arguments = "update-ref", "--create-reflog", "-m", message
    git(project, *arguments, "refs/exps/celery/stash", commit)
    done = note(project, "done", code=0, result_hash="x", status=6)
    failed = note(project, "failed", code=0, result_hash=None, status=4)
    note(project, "crashed", code=1)
    note(project, "lost", pid=os.getpid())
    code = "import sys, time; time.sleep(60)"
    running = note(project, "running")
    with subprocess.Popen([sys.executable, "-c", code, running]) as process:
        path = project / f".dvc/tmp/exps/run/{running}/{running}.json"
        path.write_text(json.dumps({"pid": process.pid, "returncode": None}))
        tasks = list_tasks(project)
        process.kill()
    assert {task.name: task.state for task in tasks} == {
        "waits": "queued",
        "done": "done",
        "failed": "failed",
        "crashed": "failed",
        "lost": "lost",
        "running": "running",
    }
    by_name = {task.name: task for task in tasks}
    assert tasks[0].digest == digest_of(content)
    assert by_name["failed"].log == Path(f".dvc/tmp/exps/run/{failed}/{failed}.out")
    assert (project / by_name["done"].log).is_file()
    assert done in str(by_name["done"].log)


def answer(monkeypatch: pytest.MonkeyPatch, *answers: list[queue.Task]) -> None:
    """Let `list_tasks` return each answer once, and the last one for ever."""
    left = list(answers)
    monkeypatch.setattr(
        queue, "list_tasks", lambda _root: left.pop(0) if len(left) > 1 else left[0]
    )


def test_waiting_ends_and_names_what_failed(project: Path, monkeypatch: pytest.MonkeyPatch):
    [member, *others] = members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    old = queue.Task("m", "failed", member.digest, Path("run/old.out"))
    queued, running, failed = (
        queue.Task("m", state, member.digest, Path("run/a.out"))
        for state in ("queued", "running", "failed")
    )
    other = queue.Task("o", "running", others[0].digest, Path("run/b.out"))
    begin, taken = [old, queued], [old]  # a worker that takes a member has it nowhere for a while
    answer(
        monkeypatch, taken, taken, begin, taken, [old, running], [old, failed], [old, failed, other]
    )
    said: list[str] = []
    wait = partial(
        wait_for, project, num_workers=1, start=pytest.fail, say=said.append, seconds=0.0
    )
    wait([member])
    assert said == ["m: failed, see run/a.out"]
    monkeypatch.setattr(queue, "_SECONDS_TO_START", 0.0)
    wait([member])  # somebody has removed it from the queue
    assert len(said) == 1


def test_workers_that_died_are_started_again(project: Path, monkeypatch: pytest.MonkeyPatch):
    [member, *_] = members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    queued, running, done = (
        queue.Task("m", state, member.digest, Path("run/a.out"))
        for state in ("queued", "running", "done")
    )
    foreign = queue.Task("other", "running", "0", Path("run/b.out"))
    answers = [queued], [queued], [running, queued], [queued, foreign, running], [queued], [done]
    answer(monkeypatch, *answers)
    monkeypatch.setattr(queue, "_SECONDS_TO_START", 0.0)
    starts: list[int] = []
    wait = partial(wait_for, project, [member], num_workers=2, start=lambda: starts.append(1))
    wait(say=lambda _: None, seconds=0.0)
    assert len(starts) == 3
    answer(monkeypatch, [queued])
    with pytest.raises(ValueError, match="no worker takes them; type `dvc queue stop --kill`"):
        wait(say=lambda _: None, seconds=0.0)
    assert len(starts) == 3 + 5


def test_a_member_that_is_in_the_queue_is_not_queued_again(
    project: Path, dvc: Path, monkeypatch: pytest.MonkeyPatch
):
    members = members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    states = "running", "queued", "failed", "lost"
    pairs = zip(members, states, strict=True)
    answer(monkeypatch, [queue.Task("x", state, each.digest, Path()) for each, state in pairs])
    queue.add_to_queue(project, members, [], say=lambda _: None)
    names = [line.split(" -n ")[1].split()[0] for line in dvc.read_text().splitlines()]
    assert names == [member.name for member in members[2:]]


@pytest.mark.parametrize(
    ("workers", "gpus", "expected"),
    [
        (2, ["0", "1", "2", "3"], ["0,2", "1,3"]),
        (3, ["0", "1"], ["0", "1", "0"]),
        (1, ["4"], ["4"]),
    ],
)
def test_gpus_are_dealt(workers: int, gpus: list[str], expected: list[str]):
    found = environments(workers, gpus)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == expected


def test_workers_on_the_cpu_have_one_thread(monkeypatch: pytest.MonkeyPatch):
    assert [each["OMP_NUM_THREADS"] for each in environments(2, [])] == ["1", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert find_gpus("auto") == ["2", "5"]
    assert find_gpus("cpu") == []


def test_each_gpu_worker_is_started_with_its_own(
    project: Path, dvc: Path, monkeypatch: pytest.MonkeyPatch
):
    program = dvc.parent / "bin/dvc"
    program.write_text(
        f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES: $*" >> "{dvc}"\n'
        'echo "Worker status: 1 active, 0 idle"\n'
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    queue.start_workers(project, 2, ["0", "1"])
    assert dvc.read_text().splitlines() == [
        *("0: queue start -j 1", ": queue status", "1: queue start -j 2"),
    ]


def test_sbatch_scripts_are_shell_and_run_their_member(project: Path, tmp_path: Path):
    [member, *_] = members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    script = script_of(member, ["probe"], root=Path("/a project"))
    path = tmp_path / "job.sbatch"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = script.splitlines()
    assert "#SBATCH --job-name=lambdas-lambda0-seed0" in lines
    assert "dvc exp run -n lambdas-lambda0-seed0 -S loss.lambda=0 -S seed=0 probe" in lines
    assert "project='/a project'" in lines
