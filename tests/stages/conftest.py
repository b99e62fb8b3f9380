"""A project whose model is trained, for tests of the stages that come after."""

from stages.runtime.run import Run, RuntimeParams

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from contradiff.method.model import ContraDiffModel


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with a store of MLflow's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.fixture
def run_of(workplace: Path) -> Callable[[str], Run]:
    """A run of the named stage on the CPU, in the working directory."""
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    return lambda stage: Run(stage=stage, root=workplace, runtime=runtime)


@pytest.fixture
def trained_project(  # noqa: PLR0917
    workplace: Path,
    run_of: Callable[[str], Run],
    tiny_base: Path,
    tiny_data: Path,
    build_tiny: Callable[..., "ContraDiffModel"],
    save_tiny: Callable[..., None],
) -> Run:
    """Work in a folder with build/base, shards, latents and pretrain, the run's root."""
    build = workplace / "build"
    build.mkdir()
    sources = {"base": tiny_base, "shards": tiny_data / "images", "latents": tiny_data / "latents"}
    for name, folder in sources.items():
        (build / name).symlink_to(folder)
    save_tiny(build / "pretrain", build_tiny(), num_steps=3, pretrain={"precision": "fp32"})
    return run_of("class_condition")


def _one_of_two(rank: int, port: int, work: Callable[[int], int | None]) -> None:
    from accelerate.state import AcceleratorState

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)
    code = 1
    try:
        code = work(rank) or 0
    finally:
        os._exit(code)


@pytest.fixture
def in_two_processes() -> Callable[[Callable[[int], int | None]], list[int | None]]:
    """Call a function with ranks 0 and 1 in forked processes, joined by gloo; their exit codes."""

    def start(work: Callable[[int], int | None]) -> list[int | None]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_one_of_two, args=(rank, port, work)) for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
            process.kill()
        return [process.exitcode for process in processes]

    return start
