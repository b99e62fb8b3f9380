"""The papers' definitions one by one."""

import math

import pytest
import torch
from torch import Tensor

from contradiff.evaluation import prdc as module
from contradiff.evaluation.prdc import prdc


def features(n: int, d: int, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def radius(points: list[list[float]], i: int, k: int) -> float:
    """Distance to the k-th nearest other point."""
    return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]


def within(point: list[float], points: list[list[float]], k: int) -> int:
    """How many of the points' balls hold this one."""
    return sum(math.dist(point, p) <= radius(points, i, k) for i, p in enumerate(points))


def transcription(fake: list[list[float]], real: list[list[float]]) -> tuple[float, ...]:
    """Kynkäänniemi et al., Eqs. 1 and 2, k = 3; Naeem et al., Eqs. 4 and 6, k = 5."""
    precision = sum(within(y, real, 3) > 0 for y in fake) / len(fake)
    recall = sum(within(x, fake, 3) > 0 for x in real) / len(real)
    density = sum(within(y, real, 5) for y in fake) / (5 * len(fake))
    coverage = sum(
        min(math.dist(x, y) for y in fake) <= radius(real, i, 5) for i, x in enumerate(real)
    ) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.5), (0.3, 0.0), (2.0, 0.0)])
def test_equals_transcription(
    scale: float, shift: float, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    fake, real = features(23, 3, seed=0, scale=scale, shift=shift), features(31, 3, seed=1)
    expected = transcription(fake.tolist(), real.tolist())
    assert tuple(prdc(fake, real).values()) == pytest.approx(expected)


def test_the_same_set_is_all_within_itself():
    x = features(40, 4, seed=0)
    found = prdc(x, x)
    # each point lies in its own ball and, on average, in five others; rounding decides at borders
    assert found.pop("density") == pytest.approx(6 / 5, rel=0.02)
    assert set(found.values()) == {1}


def test_far_apart_is_nothing_and_collapse_costs_recall_alone():
    real = features(60, 4, seed=0)
    assert set(prdc(real + 1000, real).values()) == {0}
    collapsed = prdc(real[:1] + features(60, 4, seed=1, scale=1e-3), real)
    assert collapsed["precision"] == 1
    assert collapsed["recall"] < 0.1
    assert collapsed["coverage"] < 0.5


def test_a_far_mean_costs_no_digits():
    fake, real = features(30, 3, seed=0), features(30, 3, seed=1)
    assert prdc(fake + 1e6, real + 1e6) == prdc(fake, real)
