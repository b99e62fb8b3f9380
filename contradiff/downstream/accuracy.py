"""Top-k accuracy and its confidence interval."""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on a whole set.

    Attributes:
        top1: Share of samples whose label has the highest logit, in [0, 1].
        top5: Share whose label has one of the five highest logits; 1 with up to five classes.
        total: Number of samples.
        interval: Wilson's 95% interval of `top1`.
    """

    top1: float
    top5: float
    total: int
    interval: tuple[float, float]


def topk_correct(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], k: int) -> int:
    """Count the samples whose label is among their `k` highest logits.

    Unlike means, counts of batches can be added, whatever the sizes of the batches.

    Args:
        logits: A score for each class; only the order matters. `torch.topk` decides ties.
        labels: Classes in [0, classes).
        k: From 1 to the number of classes.

    Raises:
        ValueError: A logit is NaN, so that the logits have no order.
    """
    assert 1 <= k <= logits.shape[1], k
    if bool(logits.isnan().any()):
        raise ValueError("the logits contain NaN: the classifier diverged and has no accuracy")
    predictions = logits.topk(k, dim=1).indices
    return int((predictions == labels[:, None]).sum())


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Compute the 95% confidence interval of an accuracy (Wilson, 1927), in [0, 1].

    Unlike the normal approximation it is also right for accuracies near 0 and 1. It describes the
    random choice of the test images, but not the effect of the training's seed.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
