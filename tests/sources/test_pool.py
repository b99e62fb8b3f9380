"""Jobs end when they are told, or left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contradiff.sources.pool import run_jobs

JOBS = """
import os, signal, sys, time
from pathlib import Path
from contradiff.sources.pool import run_jobs

def work(job, *, tick):
    folder, number = job
    (folder / f"{number}.pid").write_text(str(os.getpid()))
    if number == 1 and (folder / "kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 1 and (folder / "fail").exists():
        while not (folder / "0.pid").exists():
            time.sleep(0.01)
        raise ValueError("data.root: no such luck")
    for _ in range(1000 if number == 0 else 1):
        time.sleep(0.05)
        tick()
    (folder / f"{number}.done").touch()
    return number

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        for job, result in run_jobs(work, [(folder, n) for n in range(4)], num_workers=2,
                                    on_progress=lambda n: None):
            print(result, flush=True)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start four jobs in two processes, of which job 0 would take a minute."""
    script = tmp_path / "jobs.py"
    script.write_text(JOBS)

    def run() -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    return run


def is_alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("30 seconds have passed")


def test_failed_job_stops_the_others(start: Callable[[], subprocess.Popen[str]], tmp_path: Path):
    (tmp_path / "fail").touch()
    output, errors = start().communicate(timeout=60)
    assert output == "ValueError: data.root: no such luck\n"
    assert errors == ""
    assert not (tmp_path / "0.done").exists()


def test_killed_worker_is_told(start: Callable[[], subprocess.Popen[str]], tmp_path: Path):
    (tmp_path / "kill").touch()
    output, _ = start().communicate(timeout=60)
    assert output.startswith("ChildProcessError: a worker process was killed")
    assert "lower runtime.num_workers" in output


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_workers_end_with_the_one_that_started_them(
    start: Callable[[], subprocess.Popen[str]], tmp_path: Path
):
    process = start()
    wait_for((tmp_path / "3.done").exists)
    workers = {int(path.read_text()) for path in tmp_path.glob("*.pid")}
    assert process.pid not in workers
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: not any(map(is_alive, workers)))


def test_without_workers_all_is_done_here():
    told: list[int] = []

    def square(job: int, *, tick: Callable[[], None]) -> int:
        tick()
        return job * job

    results = list(run_jobs(square, [1, 2, 3], num_workers=0, on_progress=told.append))
    assert results == [(1, 1), (2, 4), (3, 9)]
    assert told == [1, 1, 1]
    assert list(run_jobs(square, [], num_workers=2, on_progress=told.append)) == []
