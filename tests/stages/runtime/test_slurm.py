"""SLURM's variables, and stages that start themselves on stand-ins for two nodes."""

from stages.runtime.launch import RENDEZVOUS
from stages.runtime.slurm import join_step, num_nodes

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.runtime import fake_slurm
from tests.stages.runtime.test_run import GO_ON, NOTHING_THERE, RUNTIME, STAGE

ROOT = Path(__file__).resolve().parents[3]
TASK = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "node[1-2]"}
TASK |= {"SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
TORCH = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}


@pytest.fixture
def batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the batch script of a job of two nodes, whose number is 4321."""
    for name in [*TORCH, "MASTER_ADDR", "MASTER_PORT", RENDEZVOUS, "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in fake_slurm.install(tmp_path / "bin").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "4321")
    return tmp_path


@pytest.mark.usefixtures("batch_script")
@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        ({}, TORCH),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, TORCH),
        ({"CUDA_VISIBLE_DEVICES": "0"}, TORCH | {"LOCAL_RANK": "0"}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}),
        ({"SLURM_STEP_ID": "4294967290"}, {}),  # the shell of salloc
        ({RENDEZVOUS: "node1:1"}, {}),  # this launcher starts processes
        ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2"}),  # torchrun has started this process
    ],
)
def test_a_task_of_srun_joins_the_others(
    changes: dict[str, str], joined: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in (TASK | changes).items():
        monkeypatch.setenv(name, value)
    join_step()
    assert {name: os.environ[name] for name in TORCH if name in os.environ} == joined
    if "RANK" in joined:
        found = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        assert found == ("127.0.0.1", "14321")


@pytest.mark.usefixtures("batch_script")
@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, 2),
        ({"SLURM_JOB_NUM_NODES": "1"}, 1),
        (TASK, 1),
        ({"SLURM_STEP_ID": "4294967290"}, 2),
        ({"WORLD_SIZE": "2"}, 1),
    ],
)
def test_only_a_batch_script_starts_nodes(
    changes: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch
):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert num_nodes() == number
    monkeypatch.delenv("SLURM_JOB_ID")
    assert num_nodes() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("gather", ""),
        ("second fails", NOTHING_THERE),
        (
            "second is lost",
            f"srun ended with code 1[34][37], because a node or a process was lost{GO_ON}",
        ),
    ],
)
def test_two_nodes_run_one_stage(batch_script: Path, act: str, message: str):
    for name in ("stages", "contradiff"):
        (batch_script / name).symlink_to(ROOT / name)
    lost = 'case "second is lost", _:\n            if not run.is_main:\n'
    lost += "                os.kill(os.getppid(), signal.SIGKILL)\n            time.sleep(60)\n"
    stage = STAGE.replace('case "second is killed"', f'{lost}        case "second is killed"', 1)
    (batch_script / "demo.py").write_text(stage)
    (batch_script / "params.yaml").write_text("seed: 3\nloss: {lambda: 1e-05}\n" + RUNTIME)
    done = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=batch_script,
        env=os.environ | {"ACT": act, "CONTRADIFF_NUM_PROCESSES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode == 0) == (not message), done.stderr
    if message:
        assert re.fullmatch(f"contradiff: demo: {message}\n", done.stderr)
    else:
        assert done.stderr.count("demo: done in") == 1
        assert [(batch_script / f"seen-by-{rank}").read_text() for rank in (0, 1)] == ["[0, 1]"] * 2
    assert not list((batch_script / ".work").glob("messages-*"))
