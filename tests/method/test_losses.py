"""The losses equal slow versions with loops, and closed forms."""

import doctest
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.method import losses
from contradiff.method.losses import CONTRASTIVE_LOSSES, min_snr_weights
from contradiff.toy.base_recipe import build_scheduler

EACH = pytest.mark.parametrize("loss", CONTRASTIVE_LOSSES.values(), ids=CONTRASTIVE_LOSSES.keys())


def draw_views(num_images: int, *, width: int = 6) -> Tensor:
    """Draw features of different lengths, which the losses must normalise."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(2, num_images, 1, generator=generator) * 5 + 0.1
    return torch.randn(2, num_images, width, generator=generator) * scale


def cosine(first: list[float], second: list[float]) -> float:
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return dot / (math.hypot(*first) * math.hypot(*second))


@pytest.mark.parametrize(("prediction_type", "more"), [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_min_snr_weights_are_those_of_diffusers(prediction_type: Any, more: float):
    from diffusers.training_utils import compute_snr

    scheduler = build_scheduler()
    ratio = compute_snr(scheduler, torch.arange(1000))
    expected = torch.stack([ratio, torch.full_like(ratio, 5.0)]).min(dim=0).values / (ratio + more)
    alphas = scheduler.alphas_cumprod
    weights = min_snr_weights(alphas, gamma=5.0, prediction_type=prediction_type)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    assert weights.max() <= 1


def slow_ntxent(views: Tensor, tau: float) -> float:
    """Compute SimCLR's Algorithm 1 for 2N rows. The partner of row k is k + N (modulo 2N)."""
    rows = views.flatten(0, 1).tolist()
    half, total = len(rows) // 2, 0.0
    for i in range(len(rows)):
        positive = (i + half) % len(rows)
        below = sum(math.exp(cosine(rows[i], rows[k]) / tau) for k in range(len(rows)) if k != i)
        total -= math.log(math.exp(cosine(rows[i], rows[positive]) / tau) / below)
    return total / len(rows)


def slow_dcl_paper(views: Tensor, tau: float) -> float:
    """Compute Eq. 6 as printed, divided by N."""
    h, h_prime = views.tolist()
    n, total = len(h), 0.0
    for i in range(n):
        above = 2 * math.exp(cosine(h[i], h_prime[i]) / tau)
        others = [view[j] for view in (h, h_prime) for j in range(n) if j != i]
        below = sum(math.exp(cosine(h[i], other) / tau) for other in others)
        total -= math.log(above / below)
    return total / n


def slow_infonce(views: Tensor, tau: float) -> float:
    """Compute CPC's loss: each row of view 1 finds its partner among all rows of view 2."""
    h, h_prime = views.tolist()
    n, total = len(h), 0.0
    for i in range(n):
        scores = [math.exp(cosine(h[i], h_prime[j]) / tau) for j in range(n)]
        total -= math.log(scores[i] / sum(scores))
    return total / n


def slow_dcl(views: Tensor, tau: float) -> float:
    """Equation 6 of Yeh et al.: each of the 2N rows against the other images' rows."""
    rows, total = views.flatten(0, 1).tolist(), 0.0
    half = len(rows) // 2
    for i in range(len(rows)):
        positive = (i + half) % len(rows)
        others = [k for k in range(len(rows)) if k not in (i, positive)]
        below = sum(math.exp(cosine(rows[i], rows[k]) / tau) for k in others)
        total += math.log(below) - cosine(rows[i], rows[positive]) / tau
    return total / len(rows)


def slow_dispersive(views: Tensor, tau: float) -> float:
    """Table 2 of Wang and He, squared distance: the InfoNCE form, a view at a time."""
    total, (_, n, width) = 0.0, views.shape
    for view in views.tolist():
        for z in view:
            distances = [sum((a - b) ** 2 for a, b in zip(z, w, strict=True)) for w in view]
            total += math.log(sum(math.exp(-d / width / tau) for d in distances) / n)
    return total / (2 * n)


@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("ntxent", slow_ntxent),
        ("dcl_paper", slow_dcl_paper),
        ("dcl", slow_dcl),
        ("infonce", slow_infonce),
        ("dispersive", slow_dispersive),
    ],
)
@pytest.mark.parametrize("num_images", [2, 7])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_equals_the_formula_written_out(name: str, slow: Any, num_images: int, temperature: float):
    views = draw_views(num_images)
    expected = pytest.approx(slow(views, temperature), rel=1e-5, abs=1e-5)
    assert CONTRASTIVE_LOSSES[name](*views, temperature=temperature).item() == expected


@EACH
def test_local_anchors_average_to_the_loss_of_the_whole_batch(loss: Any):
    """The same is true of gradients, which DDP averages."""
    views = draw_views(6).requires_grad_()
    whole = loss(*views, temperature=0.2)
    (gradient,) = torch.autograd.grad(whole, views)
    shares = [loss(*views, temperature=0.2, anchors=slice(start, start + 2)) for start in (0, 2, 4)]
    average = torch.stack(shares).mean()
    torch.testing.assert_close(average, whole)
    torch.testing.assert_close(torch.autograd.grad(average, views)[0], gradient)


@EACH
def test_autocast_does_not_round_the_similarities(loss: Any):
    views = draw_views(16, width=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*views, temperature=0.1)
    assert value.dtype == torch.float32
    assert value.equal(loss(*views, temperature=0.1))


@EACH
def test_one_image_has_no_negatives(loss: Any):
    with pytest.raises(ValueError, match=r"pretrain\.batch_size: .* at least two images"):
        loss(*draw_views(1), temperature=0.1)


def test_the_examples_of_the_docstrings_run():
    assert doctest.testmod(losses) == doctest.TestResults(failed=0, attempted=10)
