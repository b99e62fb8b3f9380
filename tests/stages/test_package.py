"""The package `stages`: how the process of a stage begins and ends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIME = "runtime: {device: cpu, num_workers: 0, log_every: 1, checkpoint_every: 1}"
STAGE = """
from stages.runtime.run import execute

import atexit
import gc
import sys
from contradiff.config import Section

slept = not gc.isenabled()

class Freed:
    def __del__(self):
        print("freed")

atexit.register(lambda: print("exit function"))
kept = Freed()

def main(params, run):
    print(f"slept: {slept}, awake: {gc.isenabled()}")
    if run.root.joinpath("fail").exists():
        raise ValueError("data.root: nothing there")

if __name__ == "__main__":
    execute(Section, main)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__py*"))
    (tmp_path / "contradiff").symlink_to(ROOT / "contradiff")
    (tmp_path / "stages/demo.py").write_text(STAGE)
    (tmp_path / "params.yaml").write_text(RUNTIME)
    return tmp_path


@pytest.mark.parametrize("fails", [False, True])
def test_success_ends_the_process_after_exit_functions_but_frees_nothing(
    project: Path, *, fails: bool
):
    if fails:
        (project / "fail").touch()
    command = [sys.executable, "-m", "stages.demo"]
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run(
        command, check=False, cwd=project, env=environment, capture_output=True, text=True
    )
    lines = ["slept: True, awake: True", "exit function", *(["freed"] if fails else [])]
    assert (done.returncode, done.stdout.splitlines()) == (2 if fails else 0, lines)
    assert ("data.root: nothing there" if fails else "demo: done in") in done.stderr
