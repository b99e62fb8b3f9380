"""Small settings for pretraining, and a function that pretrains with them."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from contradiff.data.pairs import PairedShards
from contradiff.method.model import ContraDiffModel
from contradiff.method.params import Architecture, NoiseParams
from contradiff.training.pretraining import pretrain
from contradiff.training.recipe import PretrainParams, TrainingRecipe
from contradiff.watch import Watch
from tests.method.batches import loss_params

PRETRAIN: dict[str, Any] = (
    {"epochs": 2, "warmup_epochs": 0.5, "batch_size": 6, "lr": 0.01, "scale_lr": False}
    | {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.05, "max_grad_norm": 1.0, "ema_decay": 0.0}
    | {"grad_accumulation": 1, "decode_batch_size": 0}
    | {"gradient_checkpointing": "none", "precision": "fp32"}
)
NOISE: dict[str, Any] = {"schedule": "inverse_cosine", "uniform_mix": 0.25}


@pytest.fixture
def pairs(tiny_data: Path) -> PairedShards:
    return PairedShards.open(tiny_data / "images", tiny_data / "latents", split="train")


@pytest.fixture(scope="module")
def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def recipe_of(tiny_params: dict[str, Any]) -> Callable[..., TrainingRecipe]:
    """Make a recipe. Keywords change the seed and the keys of sections."""
    conditioner = Architecture.model_validate(tiny_params).conditioner

    def make(*, seed: int = 0, **changes: dict[str, Any]) -> TrainingRecipe:
        default = {"cond_view": "crop", "drop": 0.3}
        return TrainingRecipe(
            seed=seed,
            noise=NoiseParams.model_validate(NOISE | changes.get("noise", {})),
            conditioner=conditioner.model_copy(update=default | changes.get("conditioner", {})),
            loss=loss_params(**changes.get("loss", {})),
            pretrain=PretrainParams.model_validate(PRETRAIN | changes.get("pretrain", {})),
        )

    return make


@pytest.fixture
def train(
    pairs: PairedShards, recipe_of: Callable[..., TrainingRecipe], accelerator: Any, tmp_path: Path
) -> Callable[..., list[dict[str, float]]]:
    """Call `pretrain` with small settings. Keywords change settings or sections of the recipe.

    Each call has a work folder of its own: a finished training is not trained again.
    """
    numbers = count()

    def run(model: ContraDiffModel, **changes: Any) -> list[dict[str, float]]:
        work_dir = tmp_path / str(next(numbers))
        settings: dict[str, Any] = {"work_dir": work_dir, "num_workers": 0, "log_every": 5}
        settings |= {"checkpoint_every": 1000, "on_step": lambda *_: None, "only_batches": None}
        settings["watch"] = Watch(num_steps=0, batch_size=0, device=None)
        sections = {name: changes.pop(name) for name in set(changes) - set(settings)}
        conditioner = sections.get("conditioner", {}) | {"input": model.conditioner.input}
        recipe = recipe_of(**sections | {"conditioner": conditioner})
        settings |= {"recipe": recipe, "accelerator": accelerator} | changes
        return pretrain(model, pairs, **settings)

    return run
