"""Sections of params.yaml that many tests begin with."""

from pathlib import Path
from typing import Any

from contradiff.config import read_params
from contradiff.features.params import FeaturesParams

TINY: dict[str, Any] = read_params(Path(__file__).resolve().parents[1] / "presets/tiny.yaml")


def features_params(**changes: Any) -> FeaturesParams:
    """The embedded default's, in batches of eight, with changes."""
    return FeaturesParams.model_validate(TINY["features"] | {"batch_size": 8} | changes)
