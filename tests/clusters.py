"""Labelled clusters, for tests of classifiers."""

import torch
from torch import Tensor


def clusters(
    num_samples: int, *, dim: int, num_classes: int = 4, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw Gaussian clusters, each feature at a scale and offset of its own."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    noise = torch.randn(num_samples, dim, generator=generator)
    scale = torch.logspace(-2, 2, dim)
    return (centres[labels] + spread * noise) * scale + 3 * scale, labels
