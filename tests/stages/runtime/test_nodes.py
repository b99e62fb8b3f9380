"""Two launchers of torchrun on this machine, each in its own working copy, share build/ and .work/.

They stand in for two machines with a shared folder.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file

from tests.settings import TINY

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow

Agents = list["subprocess.Popen[str]"]
Start = Callable[[str], Agents]


@pytest.fixture
def copies(
    tmp_path: Path, tiny_base: Path, tiny_data: Path, tiny_params: dict[str, Any]
) -> tuple[Path, Path]:
    """Two working copies. The first has build/ and .work/, to which the second has links."""
    content = deepcopy(TINY | tiny_params)
    content["data"]["image_size"] = 32
    content["pretrain"] |= {"batch_size": 8, "epochs": 20, "precision": "fp32"}
    content["latents"]["min_psnr"] = 1.0
    content["extractor"] |= {"width": 4, "epochs": 1, "batch_size": 8}
    content["reference"] |= {"split": "train", "num_kept": 8}
    content["generate"] |= {"num_samples": 16, "batch_size": 4, "num_inference_steps": 2}
    content["shard"]["samples_per_shard"] = 6
    content["runtime"] |= {"device": "cpu", "num_workers": 0, "log_every": 1, "checkpoint_every": 1}
    first, second = copies = tmp_path / "first", tmp_path / "second"
    for copy in copies:
        for room in ("stages", "contradiff"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / room, copy / room, ignore=ignored)
        YAML().dump(content, copy / "params.yaml")
    for name in ("build", ".work"):
        (first / name).mkdir()
        (second / name).symlink_to(first / name)
    sources = {"base": tiny_base, "shards": tiny_data / "images", "latents": tiny_data / "latents"}
    for name, folder in sources.items():
        shutil.copytree(folder, first / "build" / name)
    return copies


@pytest.fixture
def start(copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a launcher in each copy; at the end, kill all of their processes that are left."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    started: Agents = []

    def start(stage: str) -> Agents:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
        ]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
        options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
        options["env"] = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{copies[0]}/mlflow.db"}
        agents = [
            subprocess.Popen([*command, "-m", f"stages.{stage}"], cwd=copy, **options)
            for copy in copies
        ]
        started.extend(agents)
        return agents

    yield start
    for agent in started:
        agent.terminate()
        try:
            agent.wait(timeout=60)
        except subprocess.TimeoutExpired:
            agent.kill()
    end_workers(copies)


def end_workers(copies: tuple[Path, Path]) -> int:
    """Kill the processes that still work in the copies, and return how many they were."""
    left = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() in copies:
                os.kill(int(process.name), signal.SIGKILL)
                left += 1
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return left


def messages_of(agents: Agents) -> list[str]:
    texts = "".join(agent.communicate(timeout=900)[1] for agent in agents)
    return [line for line in texts.splitlines() if line.startswith("contradiff: ")]


def alone(copy: Path, stage: str) -> None:
    """Run a stage in one process."""
    env = os.environ | {"CONTRADIFF_NUM_PROCESSES": "1"}
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{copy}/mlflow.db"
    subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=copy, env=env, check=True)


def test_latents_are_those_of_one_process(copies: tuple[Path, Path], start: Start):
    def outs() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in latents.iterdir()}

    latents = copies[0] / "build/latents"
    alone(copies[0], "latents")
    expected = outs()
    shutil.rmtree(latents)
    agents = start("latents")
    assert messages_of(agents) == []
    assert [agent.returncode for agent in agents] == [0, 0]
    assert outs() == expected
    assert (copies[0] / "metrics/latents.json").exists()
    assert not (copies[1] / "metrics").exists()


def test_a_lost_launcher_ends_the_training_which_goes_on_later(
    copies: tuple[Path, Path], start: Start
):
    """It ends with the weights of two launchers that nobody killed, bit for bit."""
    weights = copies[0] / "build/pretrain/model.safetensors"
    assert messages_of(start("pretrain")) == []
    expected = load_file(weights)
    shutil.rmtree(weights.parent)
    agents = start("pretrain")
    while not list((copies[0] / ".work/pretrain").glob("*/state.safetensors")):
        assert agents[0].poll() is None
        time.sleep(0.1)
    agents[1].kill()
    end = time.monotonic() + 60
    messages = messages_of(agents)
    assert time.monotonic() < end
    again = "; run the same command to go on"
    [saved] = [text for text in messages if "saved at step" in text]
    assert re.fullmatch(rf"contradiff: pretrain: saved at step \d+{again}", saved)
    # The other process can lose its connection, or be stopped where nothing is saved.
    known = {
        f"contradiff: pretrain: {text}"
        for text in ("another process has ended", f"interrupted{again}")
    }
    assert set(messages) - {saved} <= known
    assert not weights.exists()
    agents = start("pretrain")
    assert messages_of(agents) == []
    for name, value in load_file(weights).items():
        assert value.equal(expected[name]), name


@pytest.mark.parametrize("fault", ["code", "params", "folder"])
def test_copies_that_differ_are_refused_by_one_message(
    copies: tuple[Path, Path], start: Start, fault: str
):
    first, second = copies
    if fault == "code":
        with (second / "stages/report.py").open("a") as file:
            file.write("# a later version\n")
        expected = "has other code in contradiff/ or stages/ than"
    elif fault == "params":
        text = (second / "params.yaml").read_text()
        (second / "params.yaml").write_text(text.replace("min_psnr: 1.0", "min_psnr: 2.0"))
        expected = f"latents.min_psnr is 1.0 in {socket.gethostname()}:{first}, but 2.0 in"
    else:
        (second / ".work").unlink()
        (second / ".work").mkdir()
        expected = f"{second}/.work is not the same folder"
    agents = start("latents")
    [message] = messages_of(agents)
    assert expected in message
    assert all(agent.returncode for agent in agents)
    assert not list((first / ".work").glob("**/.seen-*"))


def test_parts_that_run_at_once_give_what_a_whole_run_gives(copies: tuple[Path, Path]):
    """Each stage with `--part`: two parts in two copies, then a run that gathers them."""
    first, _ = copies
    for stage in ("pretrain", "extractor"):
        alone(first, stage)
    env = os.environ | {"CONTRADIFF_NUM_PROCESSES": "1"}
    outs = {"latents": "latents", "features": "features", "generate": "samples"}
    for stage, out in (outs | {"reference": "reference"}).items():
        folder = first / "build" / out
        alone(first, stage)
        expected = {path.name: path.read_bytes() for path in folder.iterdir()}
        shutil.rmtree(folder)
        command = [sys.executable, "-m", f"stages.{stage}", "--part"]
        parts = [
            subprocess.Popen([*command, f"{number}/2"], cwd=copy, env=env)
            for number, copy in enumerate(copies, start=1)
        ]
        assert [part.wait(timeout=900) for part in parts] == [0, 0]
        assert not folder.exists()
        alone(first, stage)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
