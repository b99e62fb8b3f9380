"""All scores of generated images against a reference, from both sets' features and logits."""

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from contradiff.config import Section
from contradiff.evaluation.fid import fid
from contradiff.evaluation.measuring import Measurement

MIN_UNBIASED_IMAGES = 10_000
"""With fewer images the metrics say that the FID is biased."""
PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5
"""k of precision and recall (Kynkäänniemi et al., 2019), of density and coverage (Naeem et al.)."""
_CHUNK = 1024
"""Rows of a matrix of distances that exist at one time."""


class ScoreParams(Section):
    """Section `score`: how generated images are scored."""

    splits: int = Field(gt=0, description="parts of the images that the inception score averages")
    batch_size: int = Field(gt=0, description="images that the extractor sees at once")
    kid_subsets: int = Field(gt=0, description="random subsets that KID averages")
    kid_subset_size: int = Field(gt=DENSITY_NEIGHBOUR, description="precision needs as many images")


def scores_of(
    samples: Measurement,
    reference: Measurement,
    *,
    params: ScoreParams,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Score generated images by one extractor and one resizer; `seed` decides KID's subsets.

    The inception score (Salimans et al., 2016) is torch-fidelity's, over contiguous splits: the
    images must not come sorted by class. A ValueError says if logits are not finite.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert params.splits <= len(samples.logits), "the stage validate refuses this"
    if not bool(samples.logits.isfinite().all()):
        raise ValueError(f"the logits of {samples.statistics.source.images} hold NaN or infinities")
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
    """The kernel distance (Bińkowski et al., 2018): its mean and deviation over random subsets.

    It is the unbiased squared MMD with the kernel (x·y/d + 1)³, in float64. Its expectation does
    not depend on the number of images, and it may come out slightly below 0. clean-fid computes it;
    torch-fidelity draws the same subsets for this seed.
    """
    from cleanfid.fid import kernel_distance

    assert subset_size <= min(len(samples), len(reference)), "the stage score refuses this"
    # clean-fid draws from NumPy's global generator, and draws of its second argument first.
    x, y = reference.double().cpu().numpy(), samples.double().cpu().numpy()
    options = {"num_subsets": 1, "max_subset_size": subset_size}
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        # It returns the mean alone; the deviation needs every subset.
        estimates = [kernel_distance(x, y, **options) for _ in range(num_subsets)]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return float(np.mean(estimates)), float(np.std(estimates))


def prdc(samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]) -> dict[str, float]:
    """Realism and diversity apart: precision and recall by torch-fidelity, the other two by us.

    A set's manifold is the union of balls about its features. Each ball reaches to the k-th nearest
    neighbour in the set. Precision is the part of the samples within the reference's manifold, and
    recall the reverse. Density is the mean number of the reference's balls that hold a sample, over
    k; it may exceed 1. Coverage is the part of the reference's balls that hold a sample.

    All depend on the number of features: compare equal counts only. A distance that equals a ball's
    radius is inside, as Kynkäänniemi et al. write. *Deviation*: Naeem et al.'s code leaves such
    exact ties out of density and coverage.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    assert min(len(samples), len(reference)) > DENSITY_NEIGHBOUR, "see ScoreParams"
    # One shift for both sets changes no distance, and keeps the digits if the mean is far from 0.
    mean = reference.double().mean(0)
    x, y = samples.double() - mean, reference.double() - mean
    options = {"prc_neighborhood": PRECISION_NEIGHBOUR, "prc_batch_size": _CHUNK}
    found = prc_features_to_metric(x, y, save_cpu_ram=True, verbose=False, **options)
    k = DENSITY_NEIGHBOUR + 1  # a feature is its own first neighbour
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
