"""Top-k accuracy and its confidence interval."""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] of `total` samples, and Wilson's 95% interval of `top1`."""

    top1: float
    top5: float  # 1 with up to five classes
    total: int
    interval: tuple[float, float]


def topk_correct(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], k: int) -> int:
    """Count the samples whose label is among their `k` highest logits; ValueError if one is NaN.

    Unlike means, counts can be added over batches of any size. `torch.topk` decides ties.
    """
    assert 1 <= k <= logits.shape[1], k
    if bool(logits.isnan().any()):
        raise ValueError("the logits contain NaN: the classifier diverged and has no accuracy")
    return int((logits.topk(k, dim=1).indices == labels[:, None]).sum())


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Compute the 95% confidence interval of an accuracy (Wilson, 1927), in [0, 1].

    It is right near 0 and 1 too. It is of the choice of test images, not of the training's seed.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
