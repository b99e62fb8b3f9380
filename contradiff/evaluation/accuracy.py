"""Accuracy: counts of right answers, and how sure they make us."""

import math

from jaxtyping import Float, Int64
from torch import Tensor

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the standard normal distribution."""


def topk_correct(logits: Float[Tensor, "n c"], labels: Int64[Tensor, " n"], k: int) -> int:
    """How many labels are among the k largest logits of their row."""
    best = logits.topk(k, dim=1).indices
    return int((best == labels[:, None]).any(dim=1).sum())


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of an accuracy, in [0, 1] also near its ends.

    Raises:
        ValueError: no samples, or more right answers than samples.
    """
    if not 0 <= correct <= total or total == 0:
        msg = f"no interval for {correct} right answers of {total}"
        raise ValueError(msg)
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) * Z_95 / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)
