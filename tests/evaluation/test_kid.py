"""clean-fid's kernel distance, on our subsets, beside a transcription and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch import Tensor

from contradiff.evaluation.kid import kid


def features(n: int, d: int, *, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) + shift


def transcription(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate (Gretton et al., 2012, Eq. 3), one kernel value at a time."""

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    xs, ys, n = x.tolist(), y.tolist(), len(x)
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += (kernel(xs[i], xs[j]) + kernel(ys[i], ys[j])) / (n * (n - 1))
            total -= 2 * kernel(xs[i], ys[j]) / n**2
    return total


def test_whole_sets_equal_the_transcription():
    x, y = features(11, 3, seed=0), features(11, 3, seed=1, shift=0.3)
    mean, std = kid(x, y, num_subsets=3, subset_size=11, seed=0)
    assert mean == pytest.approx(transcription(x, y), rel=1e-12)
    assert std == pytest.approx(0.0, abs=1e-12)


def test_equals_torch_fidelity_with_the_same_seed():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(60, 16, seed=0), features(80, 16, seed=1, shift=0.2)
    peer = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=7, kid_subset_size=40, rng_seed=5, verbose=False
    )
    found = kid(x, y, num_subsets=7, subset_size=40, seed=5)
    assert found == pytest.approx(tuple(peer.values()), rel=1e-9)


def test_leaves_the_global_generator_alone():
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    kid(features(9, 2, seed=0), features(9, 2, seed=1), num_subsets=2, subset_size=5, seed=0)
    assert np.random.rand() == expected  # noqa: NPY002


def test_is_unbiased_where_fid_is_not():
    """Small sets of one distribution: zero in the mean."""
    sets = [features(20, 8, seed=seed) for seed in range(400)]
    options = {"num_subsets": 1, "subset_size": 20, "seed": 0}
    pairs = zip(sets[::2], sets[1::2], strict=True)
    estimates = [kid(x, y, **options)[0] for x, y in pairs]
    assert abs(np.mean(estimates)) < 3 * np.std(estimates) / np.sqrt(200)
    assert min(estimates) < 0


def test_refuses_subsets_that_are_too_large():
    x = features(10, 3, seed=0)
    with pytest.raises(ValueError, match=r"score.kid_subset_size is 11; it may be 10 at most"):
        kid(x, features(20, 3, seed=1), num_subsets=2, subset_size=11, seed=0)
