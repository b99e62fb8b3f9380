"""All scores of a measurement; the inception score beside the reference code's loop."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from contradiff.evaluation.fid import FeatureSource, FeatureStatistics
from contradiff.evaluation.measuring import Measurement
from contradiff.evaluation.scores import ScoreParams, scores_of

PARAMS = ScoreParams(splits=3, batch_size=1, kid_subsets=2, kid_subset_size=20)


def measurement(logits: Tensor) -> Measurement:
    features = torch.randn(len(logits), 4, generator=torch.Generator().manual_seed(0))
    statistics = FeatureStatistics(4, source=FeatureSource("samples", "none", "e", "0" * 64))
    statistics.update(features)
    return Measurement(statistics, features, logits)


def scores(logits: Tensor, *, splits: int = 3) -> dict[str, float]:
    params = PARAMS.model_copy(update={"splits": splits})
    sets = measurement(logits), measurement(logits)
    return scores_of(*sets, params=params, seed=0, device=torch.device("cpu"))


def transcription(probabilities: np.ndarray, splits: int) -> tuple[float, float]:
    """Salimans et al., element by element: exp of the mean KL of each contiguous part."""
    n, num_classes = probabilities.shape
    found = []
    for i in range(splits):
        rows = probabilities[i * n // splits : (i + 1) * n // splits]
        marginal = [sum(row[c] for row in rows) / len(rows) for c in range(num_classes)]
        divergences = [
            sum(p * (math.log(p) - math.log(q)) for p, q in zip(row, marginal, strict=True))
            for row in rows
        ]
        found.append(math.exp(sum(divergences) / len(divergences)))
    return float(np.mean(found)), float(np.std(found))


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_equals_the_transcription(splits: int):
    logits = 2 * torch.randn(47, 5, generator=torch.Generator().manual_seed(0))
    found = scores(logits, splits=splits)
    expected = transcription(logits.double().softmax(1).numpy(), splits)
    assert (found["inception_score"], found["inception_score_std"]) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        (torch.zeros(60, 6), 1.0),  # uniform
        (100 * torch.eye(6).repeat(10, 1), 6.0),  # certain, and balanced within each split
        (100 * torch.eye(6)[:1].repeat(60, 1), 1.0),  # certain of one class
    ],
)
def test_inception_score_in_closed_form(logits: Tensor, expected: float):
    found = scores(logits, splits=5)
    assert found["inception_score"] == pytest.approx(expected)
    assert found["inception_score_std"] == pytest.approx(0.0, abs=1e-12)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="the logits of samples hold NaN"):
        scores(torch.full((40, 5), torch.nan))
