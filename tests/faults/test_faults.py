"""A short sample of `python -m tests.faults kill`, with a stage that imports nothing slow."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kill import KILLS, Case, cases_of, matrix
from tests.faults.project import HOOK, STAGES, Project

ROOT = Path(__file__).resolve().parents[2]

STAGE = '''
"""A stage that trains, and writes a file and a folder."""
from pathlib import Path

from contradiff.config import Section
from contradiff.files import replace_dir, replace_file
from stages.runtime.run import Run, execute

def main(params: Section, run: Run) -> None:
    with run.work_dir({}, [], state_version=1) as work:
        state = work / "state"
        if not state.exists():
            with Path("trainings").open("a") as file:
                file.write("x")
            with replace_file(state) as path:
                path.write_text("trained")
        with replace_dir(Path("build/out")) as folder:
            (folder / "weights").write_text(state.read_text())
        run.write_json(Path("metrics/out.json"), {"loss": 1.0})

if __name__ == "__main__":
    execute(Section, main)
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "demo.py").write_text(STAGE)
    runtime = "runtime: {device: cpu, num_workers: 0, log_every: 1, checkpoint_every: 1}\n"
    (tmp_path / "params.yaml").write_text(runtime)
    return tmp_path


def run(project: Path, kill: str = "") -> int:
    """Run the stage as DVC does; return its exit code."""
    environment = os.environ | {"DVC_ROOT": str(project), "FAULTS_KILL": kill}
    environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), str(ROOT)])
    command = [sys.executable, "-m", "demo"]
    return subprocess.run(command, cwd=project, env=environment, check=False).returncode


@pytest.mark.parametrize(
    ("name", "when", "num_trainings"),
    [("build/out", "middle", 1), ("metrics/out.json", "after", 1)],
)
def test_after_a_kill_the_same_command_gives_the_same_files(
    project: Path, name: str, when: str, num_trainings: int
):
    assert run(project, f"demo {name} {when} stage") == -signal.SIGKILL
    assert run(project) == 0
    assert (project / "build/out/weights").read_text() == "trained"
    assert (project / "metrics/out.json").exists()
    assert len((project / "trainings").read_text()) == num_trainings
    assert not list(project.glob("[bm]*/.*.part"))


def test_a_finished_stage_that_dvc_did_not_record_is_not_trained_again(project: Path):
    """DVC was killed, its stage went on, and the next `dvc repro` has deleted the outs."""
    assert run(project) == 0
    (project / "build/out/weights").unlink()
    (project / "metrics/out.json").unlink()
    assert run(project) == 0
    assert (project / "build/out/weights").read_text() == "trained"
    assert (project / "metrics/out.json").exists()
    assert (project / "trainings").read_text() == "x"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    ["kill --minutes 5", "disk --stages prepare,pretrain,score,report,track", "load --only queue"],
)
def test_programs(arguments: str):
    command = [sys.executable, "-m", "tests.faults", *arguments.split()]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_the_matrix_counts_the_cases_of_all_stages(tmp_path: Path):
    project = Project(tmp_path, {}, {stage: [f"build/{stage}"] for stage in STAGES})
    cases = list(cases_of(project, STAGES))
    assert len(cases) == len(set(cases)) == len(STAGES) * len(KILLS)
    assert {case.stage for case in cases[: len(STAGES)]} == set(STAGES)
    bad = Case("score", "build/score", "middle", "group")
    lines = list(matrix({case: ["lost"] if case == bad else [] for case in cases}, num_cases=200))
    assert next(line for line in lines if line.startswith("| score ")).count("0/1") == 1
    assert lines[-2:] == [
        f"{len(cases) - 1} of {len(cases)} cases are good; there are 200 cases",
        f"{bad}: lost",
    ]
