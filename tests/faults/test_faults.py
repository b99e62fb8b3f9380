"""A short sample of `python -m tests.faults kill`, with a stage that imports nothing slow."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest

from tests.faults.kill import DVC_ALONE, WHENS, WHOMS, cases_of, kinds_of, matrix
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
    assert run(project, f"demo {name} 1 {when} stage") == -signal.SIGKILL
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
    writes = {stage: [f"build/{stage}-{n}" for n in range(9)] + ["a", "b"] for stage in STAGES}
    project = Project(tmp_path, {}, writes, b"")
    cases = list(cases_of(project, STAGES))
    assert len(cases) == len(set(cases)) == len(STAGES) * (3 * 3 + 2)
    assert {case.stage for case in cases[: len(STAGES)]} == set(STAGES)
    assert {(case.whom, case.when) for case in cases} == {*product(WHOMS[:3], WHENS), DVC_ALONE}
    bad = next(case for case in cases if (case.stage, case.whom) == ("score", "hand"))
    number = Counter((c.stage, c.whom, c.when) for c in cases)["score", "hand", bad.when]
    lines = list(matrix({case: ["lost"] if case == bad else [] for case in cases}, num_cases=999))
    row = next(line for line in lines if line.startswith("| score "))
    assert f"| {number - 1}/{number} |" in row
    assert lines[-2:] == [
        f"{len(cases) - 1} of {len(cases)} cases are good; there are 999 cases",
        f"{bad}: lost",
    ]


def test_of_a_kind_the_middle_write_is_killed():
    writes = ["state", "s-0.tar", "state", "s-1.tar", "s-2.tar", "state", "state", "end"]
    writes += ["mlflow.db:runs", "mlflow.db:tags", "mlflow.db:runs", ".work/tmpoepdsly2/model"]
    expected = [("state", 3), ("s-1.tar", 1), ("end", 1), ("mlflow.db:runs", 1)]
    assert list(kinds_of(writes)) == expected


DATABASE = """
import sqlite3
from tests.faults.hook.sitecustomize import install
install("demo")
with sqlite3.dbapi2.connect("mlflow.db") as store:
    store.execute("CREATE TABLE runs (number)")
    for number in range(3):
        store.execute("INSERT INTO runs VALUES (?)", [number])
        store.execute("UPDATE runs SET number = number + 1")
        store.commit()
open("after")
"""


@pytest.mark.parametrize(("when", "num_rows"), [("before", 1), ("middle", 1), ("after", 2)])
def test_a_transaction_is_killed_before_it_is_committed_or_after(
    tmp_path: Path, when: str, num_rows: int
):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment["FAULTS_KILL"] = f"demo mlflow.db:runs 2 {when} stage"
    command = [sys.executable, "-c", DATABASE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        assert len(store.execute("SELECT * FROM runs").fetchall()) == num_rows
