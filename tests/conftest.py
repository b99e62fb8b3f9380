"""Set-up of all tests: array shapes are checked; one thread; no network; no tracking server."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

# A shell ignores Ctrl-C in what it starts in the background, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Set these before torch or numpy is imported. One thread is enough for small tests.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Tests start `dvc` and others of this environment, even if it is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# Tests must not write to the user's tracking server, nor act as if DVC had started them.
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
    os.environ.pop(_name, None)

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from contradiff.method.model import ContraDiffModel

# Shapes and types of `contradiff` are checked only in tests, so that runs lose no time.
# The hook must stay active in the complete session, so no `with` is used.
install_import_hook("contradiff", "beartype.beartype")

# Hypothesis uses the same examples in every run, and no time limits.
settings.register_profile("contradiff", deadline=None, derandomize=True, database=None)
settings.load_profile("contradiff")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base: 32 pixels, 8x8x4 latents, 2x2x32 bottleneck, attention as in SD's UNet."""
    from tests.settings import write_tiny_base

    folder = tmp_path_factory.mktemp("tiny_base")
    write_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_params() -> dict[str, Any]:
    """Parameters of `lora`, `conditioner` and `head` for a small ContraDiff on `tiny_base`."""
    from tests.settings import ARCHITECTURE

    return ARCHITECTURE


@pytest.fixture(scope="session")
def build_tiny(tiny_base: Path, tiny_params: dict[str, Any]) -> Callable[..., ContraDiffModel]:
    """Build a ContraDiff on `tiny_base` in evaluation mode; weights that start at 0 get random."""
    import torch

    from contradiff.method.model import build_model
    from contradiff.method.params import Architecture

    built: dict[str, ContraDiffModel] = {}  # a copy takes half the time of a new model

    def build(*, seed: int = 0, **changes: dict[str, Any]) -> ContraDiffModel:
        sections = {name: tiny_params[name] | changes.get(name, {}) for name in tiny_params}
        if (key := repr((seed, sections))) not in built:
            built[key] = build_anew(seed, sections)
        return deepcopy(built[key])

    def build_anew(seed: int, sections: dict[str, Any]) -> ContraDiffModel:
        shapes = Architecture.model_validate(sections)
        with torch.random.fork_rng(devices=[]):
            model = build_model(tiny_base, shapes, image_size=32, seed=seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad and not parameter.any():
                        parameter.normal_(std=0.2)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def save_tiny(tiny_base: Path, tiny_params: dict[str, Any]) -> Callable[..., None]:
    """Save a model from `build_tiny` to a folder. Keywords: number of steps, changed parameters."""
    from contradiff.method.checkpoint import save_checkpoint
    from contradiff.method.parameter_counts import count_parameters

    def save(folder: Path, model: ContraDiffModel, *, num_steps: int = 1, **changes: Any) -> None:
        save_checkpoint(
            folder,
            model,
            base=tiny_base,
            image_size=32,
            num_steps=num_steps,
            counts=count_parameters(model, num_vae_parameters=100),
            params=tiny_params | changes,
        )

    return save


@pytest.fixture(scope="session")
def tiny_data(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards (six images each) and latents of 24 train images (3 views) and 8 val images (1)."""
    import torch

    from contradiff.base.loading import load_vae
    from contradiff.data.encoding import LatentEncoder
    from contradiff.data.params import LatentsParams
    from contradiff.data.png import encode_png
    from contradiff.data.shard_info import ImageInfo
    from contradiff.data.shards import Sample, ShardIndex, image_record, write_split
    from tests.settings import LATENTS

    folder, vae = tmp_path_factory.mktemp("tiny_data"), load_vae(tiny_base)
    encoder = LatentEncoder(vae, LatentsParams.model_validate(LATENTS), image_size=32, seed=0)
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(40), torch.arange(36), indexing="ij")
    images, latents = {}, {}
    for split, number in (("train", 24), ("val", 8)):
        samples = []
        for index in range(number):
            angle, phase = torch.rand(2, 3, 1, 1, generator=generator) * 6
            wave = torch.sin((x * angle.cos() + y * angle.sin()) / (2 + index % 3) + phase)
            content = encode_png((wave * 127 + 128).to(torch.uint8))
            samples.append(Sample(f"{split}-{index:03d}", content, index % 3))
        stored = encoder.encode(samples, split=split)
        size = {"samples_per_shard": 6, "compression": "none"}
        records = [image_record(sample, extension="png") for sample in samples]
        images[split] = write_split(folder / "images", split, records, **size)
        records = [item.to_record() for item in stored]
        latents[split] = write_split(folder / "latents", split, records, **size)
    ShardIndex(images, ImageInfo(class_ids=("a", "b", "c"))).write(folder / "images")
    ShardIndex(latents, encoder.info).write(folder / "latents")
    return folder
