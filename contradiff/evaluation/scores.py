"""All scores of generated images: their features and logits are compared with a reference's."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from contradiff.evaluation.fid import fid
from contradiff.evaluation.measuring import Measurement
from contradiff.evaluation.params import DENSITY_NEIGHBOUR, ScoreParams

SCORES = (
    *("fid", "kid", "kid_std", "precision", "recall", "density", "coverage"),
    *("inception_score", "inception_score_std"),
)
"""Keys of metrics/score.json. They are null if no score may be given ("withheld" says why)."""
MIN_UNBIASED_IMAGES = 10_000
"""If either set has fewer images, metrics/score.json says that the FID is biased."""
PRECISION_NEIGHBOUR = 3
"""k for precision and recall (Kynkäänniemi et al., 2019)."""
_CHUNK = 1024
"""How many rows of a matrix of distances are in memory at a time."""


def scores_of(
    samples: Measurement,
    reference: Measurement,
    *,
    params: ScoreParams,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Score generated images by one extractor and one resizer. `seed` chooses KID's subsets.

    The images must not be sorted by class, because the inception score (Salimans et al., 2016) is
    averaged over contiguous parts. Raises ValueError if a logit is not finite.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert params.splits <= len(samples.logits), "the stage validate refuses this"
    if not bool(samples.logits.isfinite().all()):
        raise ValueError(
            f"the logits of {samples.statistics.source.images} contain NaN or infinities"
        )
    x, y, size = samples.kept, reference.kept, params.kid_subset_size
    kid_mean, kid_std = kid(x, y, num_subsets=params.kid_subsets, subset_size=size, seed=seed)
    found = isc_features_to_metric(samples.logits, splits=params.splits, shuffle=False)
    scores = {"fid": fid(samples.statistics, reference.statistics)}
    scores |= {"kid": kid_mean, "kid_std": kid_std, **prdc(x.to(device), y.to(device))}
    scores["inception_score"] = found["inception_score_mean"]
    return scores | {"inception_score_std": found["inception_score_std"]}


def kid(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    *,
    num_subsets: int,
    subset_size: int,
    seed: int,
) -> tuple[float, float]:
    """Return the mean and the standard deviation of KID (Bińkowski et al., 2018) over subsets.

    KID is the unbiased squared MMD with the kernel (x·y/d + 1)³, computed by clean-fid in float64.
    It may be slightly below 0. For this seed, torch-fidelity draws the same random subsets.
    """
    from cleanfid.fid import kernel_distance

    assert subset_size <= min(len(samples), len(reference)), "the stage score refuses this"
    # clean-fid draws from NumPy's global generator, first for its second argument.
    x, y = reference.double().cpu().numpy(), samples.double().cpu().numpy()
    options = {"num_subsets": 1, "max_subset_size": subset_size}
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        # For several subsets, clean-fid would return only the mean, which gives no deviation.
        estimates = [kernel_distance(x, y, **options) for _ in range(num_subsets)]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return float(np.mean(estimates)), float(np.std(estimates))


def prdc(samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]) -> dict[str, float]:
    """Return precision and recall (by torch-fidelity), density and coverage (by us).

    Each feature of a set has a ball, whose radius is the distance to its k-th nearest neighbour in
    the set. The union of the balls is the set's manifold. Precision is the fraction of samples in
    the reference's manifold. Recall is the fraction of reference images in the samples' manifold.
    Density is the mean number of the reference's balls that contain a sample, divided by k; it may
    exceed 1. Coverage is the fraction of the reference's balls that contain a sample.

    All four scores depend on the numbers of images, so compare scores only for equal numbers. Balls
    include their surface, as in Kynkäänniemi et al. *Deviation*: not so in Naeem et al.'s code.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    assert min(len(samples), len(reference)) > DENSITY_NEIGHBOUR, "see ScoreParams"
    # Shifting both sets alike changes no distance, and keeps precision if the mean is far from 0.
    mean = reference.double().mean(0)
    x, y = samples.double() - mean, reference.double() - mean
    options = {"prc_neighborhood": PRECISION_NEIGHBOUR, "prc_batch_size": _CHUNK}
    found = prc_features_to_metric(x, y, save_cpu_ram=True, verbose=False, **options)
    k = DENSITY_NEIGHBOUR + 1  # plus 1, because each feature is its own nearest neighbour
    radii = torch.cat([torch.cdist(rows, y).kthvalue(k).values for rows in y.split(_CHUNK)])
    num_within = 0
    covered = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for rows in x.split(_CHUNK):
        within = torch.cdist(rows, y) <= radii
        num_within += int(within.sum())
        covered |= within.any(0)
    realism = {"precision": found["precision"], "recall": found["recall"]}
    density = num_within / (DENSITY_NEIGHBOUR * len(x))
    return realism | {"density": density, "coverage": float(covered.double().mean())}
