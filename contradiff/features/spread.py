"""How widely features spread over images. Features that are all the same tell nothing."""

import torch
from jaxtyping import Float
from torch import Tensor

MAX_ROWS = 512
"""Most features that are looked at."""


def effective_rank(features: Float[Tensor, "n width"]) -> float:
    """Compute exp(entropy) of the centred features' singular values, divided by their sum.

    The result is 0 if all features are the same up to rounding, and 1 if they lie on a line. It is
    the features' width if they vary equally in all directions (Roy and Vetterli, 2007).
    """
    whole = features.double()
    values = torch.linalg.svdvals(whole - whole.mean(dim=0))
    if values[0] <= 1e-6 * whole.norm():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def check_spread(features: Float[Tensor, "n width"], *, name: str) -> float:
    """Return the effective rank of the first MAX_ROWS features.

    Raises ValueError, which begins with `name`, if a feature is not finite, or if all images have
    the same feature.
    """
    some, fault = features[:MAX_ROWS], ""
    finite = some.isfinite().all(dim=1)
    rank = effective_rank(some) if bool(finite.all()) else 0.0
    if not bool(finite.all()):
        fault = f"the features of {int((~finite).sum())} of {len(some)} images are not finite"
    elif rank == 0 and len(some) > 1:
        fault = f"all {len(some)} images have the same feature, so its effective rank is 0"
    if fault:
        why = "the model diverged or collapsed in its training"
        remedy = "see the losses in metrics/pretrain.csv, and lower pretrain.lr"
        raise ValueError(f"{name}: {fault}: {why}; {remedy}")
    return rank
