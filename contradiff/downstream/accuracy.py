"""Top-k accuracy and how uncertain it is."""

import math

from jaxtyping import Float, Int64
from torch import Tensor

_Z_95 = 1.959963984540054
"""Standard normal quantile at 0.975."""


def topk_correct(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], k: int) -> int:
    """Count the samples whose label is among their `k` highest logits.

    Counts, unlike means, add up exactly over batches of any sizes.

    Args:
        logits: scores of each class; only their order matters. Ties fall as `torch.topk` lets them.
        labels: classes in [0, classes).
        k: at least 1, at most the number of classes.

    Raises:
        ValueError: `k` is out of range, or a logit is NaN, which has no order.
    """
    num_classes = logits.shape[1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"top-{k} needs k between 1 and the number of classes, {num_classes}")
    if bool(logits.isnan().any()):
        raise ValueError("logits hold NaN: the classifier diverged, so that it has no accuracy")
    predictions = logits.topk(k, dim=1).indices
    return int((predictions == labels[:, None]).sum())


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% confidence interval of an accuracy (Wilson, 1927).

    Unlike the normal approximation it stays within [0, 1] and is right near its ends. It accounts
    for the choice of the test images only, not for the training's seed.

    Args:
        correct: samples classified correctly.
        total: samples in all.

    Returns:
        The lower and the upper end, as fractions.

    Raises:
        ValueError: there are no samples, or `correct` is not between 0 and `total`.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"no accuracy: {correct} correct of {total} samples")
    rate = correct / total
    shrink = 1 + _Z_95**2 / total
    centre = (rate + _Z_95**2 / (2 * total)) / shrink
    margin = _Z_95 / shrink * math.sqrt(rate * (1 - rate) / total + (_Z_95 / (2 * total)) ** 2)
    # At 0 and at `total` an end is exactly 0 or 1; rounding would leave it a hair beside.
    lower = 0.0 if correct == 0 else centre - margin
    upper = 1.0 if correct == total else centre + margin
    return lower, upper
