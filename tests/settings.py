"""Sections of params.yaml that many tests begin with."""

from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from contradiff.config import read_params
from contradiff.features.params import FeaturesParams

TINY: dict[str, Any] = read_params(Path(__file__).resolve().parents[1] / "presets/tiny.yaml")
GENERATE = TINY["generate"] | {"num_samples": 5, "num_inference_steps": 2, "batch_size": 4}
LATENTS = TINY["latents"] | {"views": 3, "colour_jitter": 0.0, "min_psnr": 0.0, "batch_size": 24}
"""As `tiny_data` was made."""


def features_params(**changes: Any) -> FeaturesParams:
    """The embedded default's, in batches of eight, with changes."""
    return FeaturesParams.model_validate(TINY["features"] | {"batch_size": 8} | changes)


def override(content: dict[str, Any], changes: str) -> None:
    """Change parameters as `-S` does: "seed=1 lora.rank=4"."""
    for change in changes.split():
        key, _, text = change.partition("=")
        section, _, name = key.rpartition(".")
        place = content[section] if section else content
        assert name in place, f"{key} is no parameter"
        place[name] = YAML(typ="safe").load(StringIO(text))
