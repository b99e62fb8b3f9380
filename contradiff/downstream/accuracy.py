"""Top-k accuracy and how uncertain it is."""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a whole set.

    Attributes:
        top1: share of samples whose label has the greatest logit, in [0, 1].
        top5: share whose label is among the five greatest (or all, with fewer classes).
        total: samples in the set.
        interval: Wilson's 95% interval of `top1`.
    """

    top1: float
    top5: float
    total: int
    interval: tuple[float, float]


def topk_correct(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], k: int) -> int:
    """Count the samples whose label is among their `k` highest logits.

    Counts, unlike means, add up exactly over batches of any sizes.

    Args:
        logits: scores of each class; only their order matters. Ties fall as `torch.topk` lets them.
        labels: classes in [0, classes).
        k: at least 1, at most the number of classes.

    Raises:
        ValueError: a logit is NaN, which has no order.
    """
    assert 1 <= k <= logits.shape[1], k
    if bool(logits.isnan().any()):
        raise ValueError("logits hold NaN: the classifier diverged, so that it has no accuracy")
    predictions = logits.topk(k, dim=1).indices
    return int((predictions == labels[:, None]).sum())


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% confidence interval of an accuracy (Wilson, 1927), as fractions.

    Unlike the normal approximation it stays within [0, 1] and is right near its ends. It accounts
    for the choice of the test images only, not for the training's seed.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
