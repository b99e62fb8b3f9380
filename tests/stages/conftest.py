"""A project whose model is trained, for tests of the stages that come after."""

from stages._runtime import Run, RuntimeParams

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from contradiff.model import ContraDiff


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with a store of MLflow's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.fixture
def trained_project(
    workplace: Path,
    tiny_base: Path,
    tiny_data: Path,
    tiny_params: dict[str, Any],
    build_tiny: Callable[..., "ContraDiff"],
) -> Run:
    """Work in a folder with build/base, shards, latents and pretrain.

    The run is of a stage of any name; its root is the folder.
    """
    from contradiff.checkpoint import save_checkpoint
    from contradiff.parameter_counts import count_parameters

    build = workplace / "build"
    build.mkdir()
    sources = {"base": tiny_base, "shards": tiny_data / "images", "latents": tiny_data / "latents"}
    for name, folder in sources.items():
        (build / name).symlink_to(folder)
    model = build_tiny()
    save_checkpoint(
        build / "pretrain",
        model,
        base=tiny_base,
        image_size=32,
        num_steps=3,
        counts=count_parameters(model, num_vae_parameters=0),
        params=tiny_params | {"pretrain": {"precision": "fp32"}},
    )
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    return Run(stage="class_condition", root=workplace, runtime=runtime)
