"""Labelled clusters of points, and a probe trained on them, for tests of classifiers."""

from typing import Any

import torch
from torch import Tensor

from contradiff.downstream.params import SgdSchedule, SgdSetting
from contradiff.downstream.probe import train_probes

SETTING = SgdSetting(lr=0.01, momentum=0.9, weight_decay=0.0)
SCHEDULE = SgdSchedule(batch_size=64, epochs=10, warmup_epochs=1.0)


def clusters(
    num_samples: int, *, dim: int, num_classes: int = 4, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw Gaussian clusters whose features have different scales and offsets."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    noise = torch.randn(num_samples, dim, generator=generator)
    scale = torch.logspace(-2, 2, dim)
    return (centres[labels] + spread * noise) * scale + 3 * scale, labels


def train_one(features: Tensor, labels: Tensor, **changes: Any) -> Any:
    """Train a single probe on the CPU."""
    setting = changes.pop("setting", SETTING)
    shared = {"num_classes": 4, "schedule": SCHEDULE, "seed": 0, "device": torch.device("cpu")}
    [probe] = train_probes(features, labels, settings=[setting], **(shared | changes))
    return probe
