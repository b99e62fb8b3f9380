"""Each score beside a transcription of its paper, and beside a peer library."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from contradiff.evaluation import scores as module
from contradiff.evaluation.fid import FeatureSource, FeatureStatistics
from contradiff.evaluation.measuring import Measurement
from contradiff.evaluation.params import ScoreParams
from contradiff.evaluation.scores import kid, prdc, scores_of

PARAMS = ScoreParams(splits=3, batch_size=1, kid_subsets=2, kid_subset_size=20)
Points = list[list[float]]


def features(n: int, d: int, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def transcribed_kid(xs: Points, ys: Points) -> float:
    """The unbiased estimate (Gretton et al., 2012, Eq. 3), one kernel value at a time."""

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, total = len(xs), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += (kernel(xs[i], xs[j]) + kernel(ys[i], ys[j])) / (n * (n - 1))
            total -= 2 * kernel(xs[i], ys[j]) / n**2
    return total


def test_kid_of_whole_sets_equals_the_transcription():
    x, y = features(11, 3, seed=0), features(11, 3, seed=1, shift=0.3)
    found = kid(x, y, num_subsets=3, subset_size=11, seed=0)
    expected = transcribed_kid(x.tolist(), y.tolist())
    assert found == (pytest.approx(expected, rel=1e-12), pytest.approx(0.0, abs=1e-12))


def test_kid_equals_torch_fidelitys_and_leaves_the_global_generator_alone():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = features(60, 16, seed=0), features(80, 16, seed=1, shift=0.2)
    options = {"kid_subsets": 7, "kid_subset_size": 40, "rng_seed": 5, "verbose": False}
    peer = kid_features_to_metric(x, y, **options)
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    found = kid(x, y, num_subsets=7, subset_size=40, seed=5)
    assert np.random.rand() == expected  # noqa: NPY002
    assert found == pytest.approx(tuple(peer.values()), rel=1e-9)


def radius(points: Points, i: int, k: int) -> float:
    """Distance to the k-th nearest other point."""
    return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]


def within(point: list[float], points: Points, k: int) -> int:
    """How many of the points' balls hold this one."""
    return sum(math.dist(point, p) <= radius(points, i, k) for i, p in enumerate(points))


def transcribed_prdc(fake: Points, real: Points) -> tuple[float, ...]:
    """Kynkäänniemi et al., Eqs. 1 and 2, k = 3; Naeem et al., Eqs. 4 and 6, k = 5."""
    precision = sum(within(y, real, 3) > 0 for y in fake) / len(fake)
    recall = sum(within(x, fake, 3) > 0 for x in real) / len(real)
    density = sum(within(y, real, 5) for y in fake) / (5 * len(fake))
    nearest = [min(math.dist(x, y) for y in fake) for x in real]
    covered = sum(nearest[i] <= radius(real, i, 5) for i in range(len(real)))
    return precision, recall, density, covered / len(real)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.5), (0.3, 0.0), (2.0, 0.0)])
def test_prdc_equals_the_transcription(
    scale: float, shift: float, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    fake, real = features(23, 3, seed=0, scale=scale, shift=shift), features(31, 3, seed=1)
    found = prdc(fake, real)
    assert tuple(found.values()) == pytest.approx(transcribed_prdc(fake.tolist(), real.tolist()))
    assert prdc(fake + 1e6, real + 1e6) == found  # a far mean costs no digits


def inception_score(logits: Tensor, *, splits: int = 3) -> tuple[float, float]:
    values = features(len(logits), 4, seed=0).float()
    source = FeatureSource("samples", "none", "e", "0" * 64)
    own = Measurement(FeatureStatistics.of(values, source=source), values, logits)
    params = PARAMS.model_copy(update={"splits": splits})
    found = scores_of(own, own, params=params, seed=0, device=torch.device("cpu"))
    return found["inception_score"], found["inception_score_std"]


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_equals_the_transcription(splits: int):
    """Salimans et al., element by element: exp of the mean KL of each contiguous part."""
    logits = 2 * torch.randn(47, 5, generator=torch.Generator().manual_seed(0))
    parts = []
    for i in range(splits):
        rows = logits.double().softmax(1)[i * 47 // splits : (i + 1) * 47 // splits].tolist()
        marginal = [sum(row[c] for row in rows) / len(rows) for c in range(5)]
        total = sum(p * math.log(p / marginal[c]) for row in rows for c, p in enumerate(row))
        parts.append(math.exp(total / len(rows)))
    expected = pytest.approx((float(np.mean(parts)), float(np.std(parts))), rel=1e-9)
    assert inception_score(logits, splits=splits) == expected


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="the logits of samples contain NaN"):
        inception_score(torch.full((40, 5), torch.nan))
