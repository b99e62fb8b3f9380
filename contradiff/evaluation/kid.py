"""The kernel distance of two sets of features, KID on Inception's (Bińkowski et al., 2018).

features (n d) of both sets -> mean and deviation over random subsets of the squared MMD
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 2048
"""Rows of the kernel matrix that exist at one time."""


def kernel_distance(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    *,
    num_subsets: int,
    subset_size: int,
    seed: int,
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x·y/d + 1)³, over random subsets, in float64.

    Unlike the Fréchet distance its expectation does not depend on how many samples there are; it
    may come out slightly below zero. The subsets are those that torch-fidelity draws for this seed.

    Args:
        samples: features of the generated images.
        reference: features of the real ones.
        num_subsets: how many pairs of subsets.
        subset_size: images of each, drawn without repetition.
        seed: of the subsets.

    Returns:
        Mean and population deviation over the subsets.

    Raises:
        ValueError: a set is smaller than a subset.
    """
    smallest = min(len(samples), len(reference))
    if not 2 <= subset_size <= smallest:
        raise ValueError(
            f"score.kid_subset_size is {subset_size}; it must be from 2 to {smallest}, the number "
            "of images whose features are kept (reference.num_kept, generate.num_samples)"
        )
    random = np.random.RandomState(seed)  # torch-fidelity's, for equal subsets
    estimates = np.zeros(num_subsets)
    for i in range(num_subsets):
        x = samples[_chosen(random, len(samples), subset_size)].double()
        y = reference[_chosen(random, len(reference), subset_size)].double()
        estimates[i] = squared_mmd(x, y)
    return float(estimates.mean()), float(estimates.std())


def _chosen(random: np.random.RandomState, total: int, size: int) -> Tensor:
    return torch.from_numpy(random.choice(total, size, replace=False))


def squared_mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """Unbiased estimate of the squared MMD of two sets of one size n.

    Σ_{i≠j} k(x_i, x_j) / n(n-1) + Σ_{i≠j} k(y_i, y_j) / n(n-1) - 2 Σ_{ij} k(x_i, y_j) / n²
    """
    n = len(x)
    within = sum(_kernel_sum(a, a) - float(_kernel(a, a).sum()) for a in (x, y))
    return within / (n * (n - 1)) - 2 * _kernel_sum(x, y) / n**2


def _kernel_sum(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    return sum(float((rows @ b.T / a.shape[1] + 1).pow(3).sum()) for rows in a.split(_CHUNK))


def _kernel(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The kernel of each row with the row of the same number."""
    return ((a * b).sum(1) / a.shape[1] + 1).pow(3)
