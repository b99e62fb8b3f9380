"""The feature model that `features.model` names, for the cache and for sets of another kind."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from contradiff.features.extraction import CleanBatch, FeatureSet
from contradiff.features.models import FeatureModel, load_diffusion_features
from contradiff.features.params import FeaturesParams
from contradiff.features.timm_backbone import TimmFeatures


def load_feature_model(
    params: FeaturesParams,
    *,
    checkpoint: Path,
    base: Path,
    keep_maps: bool,
    seed: int,
    device: torch.device,
    root: Path,
) -> FeatureModel:
    """Load the trained model or a baseline.

    Args:
        params: which, and how features are taken.
        checkpoint: the trained model's folder.
        base: its base's folder.
        keep_maps: whether the maps are given beside the features.
        seed: of the noise.
        device: where to compute.
        root: what `features.timm_weights` is relative to.

    Raises:
        ValueError: a model cannot be had, or lacks a block that is asked for; names the key.
    """
    if params.model != "timm":
        return load_diffusion_features(
            params,
            checkpoint=checkpoint,
            base=base,
            keep_maps=keep_maps,
            seed=seed,
            device=device,
        )
    assert params.timm_name is not None
    return TimmFeatures(
        params.timm_name,
        weights=None if params.timm_weights is None else root / params.timm_weights,
        precision=params.precision,
        device=device,
    )


def features_of_all(
    model: FeatureModel, batches: Iterable[CleanBatch], *, on_progress: Callable[[int], None]
) -> FeatureSet:
    """The main column of every batch, float32, in memory: for sets of some ten thousand images."""
    features: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []
    main = model.columns[0].name
    for batch in batches:
        features.append(model(batch)[main].float().cpu())
        labels.append(batch.labels)
        keys += batch.keys
        on_progress(len(batch.labels))
    return FeatureSet(torch.cat(features), torch.cat(labels), tuple(keys))
