"""Against pytorch-fid's formula, numpy and closed forms."""

from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torch import Tensor

from contradiff.evaluation.fid import FeatureSource, FeatureStatistics, fid, frechet_distance

SOURCE = FeatureSource(images="val", resizer="none", extractor="e", fingerprint="0" * 64)


def statistics_of(features: Tensor) -> FeatureStatistics:
    return FeatureStatistics.of(features, source=SOURCE)


def correlated(n: int, d: int, *, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + shift


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 1000))
def test_sums_of_batches_equal_numpy(sizes: list[int], seed: int):
    features = correlated(sum(sizes) + 1, 5, seed=seed, shift=100.0)
    found = reduce(add, map(statistics_of, features.split([1, *sizes])))
    assert found.num_samples == len(features)
    np.testing.assert_allclose(found.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), rtol=1e-9, atol=1e-9)


def test_a_large_mean_costs_no_digits_and_nan_is_refused():
    features = correlated(200, 3, seed=0)
    near, far = statistics_of(features), statistics_of(features + 1e7)
    torch.testing.assert_close(far.covariance, near.covariance, rtol=1e-7, atol=0)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="features of val contain NaN"):
            statistics_of(features.index_fill(0, torch.tensor([7]), bad))


@pytest.mark.parametrize("dimensions", [1, 6, 40])
def test_equals_pytorch_fid(dimensions: int):
    a = statistics_of(correlated(400, dimensions, seed=0))
    b = statistics_of(correlated(300, dimensions, seed=1, shift=0.5))
    mu1, sigma1, mu2, sigma2 = (x.numpy() for x in (a.mean, a.covariance, b.mean, b.covariance))
    # The formula of pytorch-fid and clean-fid, by a square root of the product.
    covmean, diff = linalg.sqrtm(sigma1.dot(sigma2)).real, mu1 - mu2
    expected = diff.dot(diff) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(covmean)
    assert fid(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid(b, a) == pytest.approx(expected, rel=1e-9)
    assert fid(a, a) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9, 0.0])
def test_nearly_singular_covariances(smallest: float):
    """Of one basis: Σ (s - t)², though most of the eigenvalues are nearly zero or zero."""
    d, zero = 60, torch.zeros(60, dtype=torch.float64)
    sigma = torch.full((d,), smallest, dtype=torch.float64)
    tau = sigma.clone()
    sigma[:9], tau[:5] = torch.linspace(1, 3, 9), 2.0
    rotation = torch.linalg.qr(correlated(d, d, seed=0)).Q
    a, b = (rotation @ torch.diag(s**2) @ rotation.T for s in (sigma, tau))
    expected = float(((sigma - tau) ** 2).sum())
    for x, y in ((a, b), (b, a)):
        assert frechet_distance(zero, x, zero, y) == pytest.approx(expected, rel=2e-6)
    nothing = torch.zeros(d, d, dtype=torch.float64)
    assert frechet_distance(zero, nothing, zero, nothing) == 0.0


def test_fewer_samples_than_dimensions_have_a_distance():
    """torch-fidelity's formula, which bears singular covariances; `fid` refuses."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sets = [correlated(12, 40, seed=0), correlated(15, 40, seed=0, shift=0.5) * 1.5]
    a, b = (statistics_of(features) for features in sets)
    found = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    peers = [fid_features_to_statistics(features) for features in sets]
    expected = fid_statistics_to_metric(*peers, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=1e-5)
