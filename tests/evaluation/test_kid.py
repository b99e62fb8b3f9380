"""A transcription, and two peers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from contradiff.evaluation import kid as module
from contradiff.evaluation.kid import kernel_distance, squared_mmd


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


def test_equals_transcription(monkeypatch: pytest.MonkeyPatch):
    x, y = features(11, 3, seed=0), features(11, 3, seed=1, shift=0.3)
    expected = transcription(x, y)
    assert squared_mmd(x.double(), y.double()) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(module, "_CHUNK", 4)
    assert squared_mmd(x.double(), y.double()) == pytest.approx(expected, rel=1e-12)


def test_equals_torch_fidelity_with_the_same_seed():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(60, 16, seed=0), features(80, 16, seed=1, shift=0.2)
    peer = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=7, kid_subset_size=40, rng_seed=5, verbose=False
    )
    found = kernel_distance(x, y, num_subsets=7, subset_size=40, seed=5)
    expected = (
        peer["kernel_inception_distance_mean"],
        peer["kernel_inception_distance_std"],
    )
    assert found == pytest.approx(expected, rel=1e-9)


def test_equals_clean_fid_on_whole_sets():
    from cleanfid.fid import kernel_distance as clean_fid

    x, y = features(50, 16, seed=0).double(), features(50, 16, seed=1, shift=0.2).double()
    found, std = kernel_distance(x, y, num_subsets=3, subset_size=50, seed=0)
    assert found == pytest.approx(clean_fid(y.numpy(), x.numpy(), num_subsets=3), rel=1e-9)
    assert std == pytest.approx(0.0, abs=1e-12)


def test_is_unbiased_where_the_frechet_distance_is_not():
    """Small sets of one distribution: zero in the mean."""
    estimates = [
        squared_mmd(features(20, 8, seed=2 * i).double(), features(20, 8, seed=2 * i + 1).double())
        for i in range(200)
    ]
    assert abs(np.mean(estimates)) < 3 * np.std(estimates) / np.sqrt(200)
    assert min(estimates) < 0


@pytest.mark.parametrize("size", [1, 11])
def test_refuses_impossible_subsets(size: int):
    x = features(10, 3, seed=0)
    with pytest.raises(ValueError, match=rf"score.kid_subset_size is {size}; .* from 2 to 10"):
        kernel_distance(x, features(20, 3, seed=1), num_subsets=2, subset_size=size, seed=0)
