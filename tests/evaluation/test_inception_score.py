"""Against the reference code's loop and closed forms."""

import math

import numpy as np
import pytest
import torch

from contradiff.evaluation.inception_score import InceptionSums, inception_score


def transcription(probabilities: np.ndarray, splits: int) -> tuple[float, float]:
    """Salimans et al., element by element: exp of the mean KL of each contiguous part."""
    n, num_classes = probabilities.shape
    scores = []
    for i in range(splits):
        part = probabilities[i * n // splits : (i + 1) * n // splits]
        marginal = [sum(row[c] for row in part) / len(part) for c in range(num_classes)]
        divergences = []
        for row in part:
            kl = 0.0
            for p, q in zip(row, marginal, strict=True):
                kl += p * (math.log(p) - math.log(q))
            divergences.append(kl)
        scores.append(math.exp(sum(divergences) / len(divergences)))
    return float(np.mean(scores)), float(np.std(scores))


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_equals_transcription(splits: int):
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(47, 5, generator=generator)).double().softmax(1)
    expected = transcription(probabilities.numpy(), splits)
    assert inception_score(probabilities, splits=splits) == pytest.approx(expected, rel=1e-12)


def test_float32_probabilities_are_good_enough():
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(500, 1000, generator=generator)
    single, double = logits.softmax(1), logits.double().softmax(1)
    expected = inception_score(double, splits=5)
    assert inception_score(single, splits=5) == pytest.approx(expected, rel=1e-5)


def test_streaming_and_merging_change_nothing():
    """Batches and shards end anywhere, also within a split."""
    generator = torch.Generator().manual_seed(2)
    probabilities = torch.randn(53, 6, generator=generator).double().softmax(1)
    expected = inception_score(probabilities, splits=7)
    whole = InceptionSums(num_images=53, splits=7, num_classes=6)
    for first, end in ((0, 20), (20, 21), (21, 53)):
        part = InceptionSums(num_images=53, splits=7, num_classes=6)
        for start in range(first, end, 8):
            part.update(probabilities[start : min(start + 8, end)], start=start)
        whole.merge(part)
    assert whole.score() == pytest.approx(expected, rel=1e-12)


def test_equals_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(100, 30, generator=torch.Generator().manual_seed(3))
    peer = isc_features_to_metric(logits, splits=4, shuffle=False)
    expected = peer["inception_score_mean"], peer["inception_score_std"]
    found = inception_score(logits.double().softmax(1), splits=4)
    assert found == pytest.approx(expected, rel=1e-9)


def test_uniform_is_one():
    mean, std = inception_score(torch.full((20, 8), 1 / 8), splits=4)
    assert mean == pytest.approx(1.0)
    assert std == pytest.approx(0.0, abs=1e-12)


def test_certain_and_balanced_is_the_number_of_classes():
    mean, std = inception_score(torch.eye(6).repeat(10, 1), splits=5)
    assert mean == pytest.approx(6.0)
    assert std == pytest.approx(0.0, abs=1e-12)


def test_certain_of_one_class_is_one():
    assert inception_score(torch.eye(6)[:1].repeat(10, 1), splits=1)[0] == pytest.approx(1.0)


def test_refusals():
    with pytest.raises(ValueError, match=r"score.splits is 5"):
        inception_score(torch.full((4, 2), 0.5), splits=5)
    for row in ([0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="sum to 1"):
            inception_score(torch.tensor([[0.5, 0.5], row]), splits=1)
