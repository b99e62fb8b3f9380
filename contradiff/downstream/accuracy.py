"""Top-k accuracy and its confidence interval."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from contradiff.imports import slow_import


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in [0, 1], and Wilson's 95% interval of `top1`."""

    top1: float
    top5: float  # always 1 if there are at most five classes
    total: int  # number of samples
    interval: tuple[float, float]

    def metrics(self) -> dict[str, Any]:
        """Return the accuracies and the interval by their names in a metrics file."""
        return {"top1": self.top1, "top5": self.top5, "interval": self.interval}


def topk_correct(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], k: int) -> int:
    """Count the samples whose label is among the sample's `k` highest logits.

    `torch.topk` decides between equal logits. Raises ValueError if a logit is NaN.
    """
    assert 1 <= k <= logits.shape[1], k
    if bool(logits.isnan().any()):
        raise ValueError("the logits contain NaN, because the training of the classifier diverged")
    return int((logits.topk(k, dim=1).indices == labels[:, None]).sum())


def accuracy_of(logits: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> Accuracy:
    """Compute the accuracy of n ≥ 1 samples. Raises ValueError if a logit is NaN."""
    total, num_classes = logits.shape
    top1, top5 = (topk_correct(logits, labels, k) for k in (1, min(5, num_classes)))
    return Accuracy(top1 / total, top5 / total, total, wilson_interval(top1, total))


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Compute the 95% confidence interval of an accuracy (Wilson, 1927), in [0, 1].

    The interval is also correct for accuracies near 0 and 1. It shows how much the accuracy may
    change with other test images. It does not show how much another training seed changes it.
    """
    with slow_import():
        from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
