"""All scores of generated images against a reference, from their measurements."""

import torch
from pydantic import Field

from contradiff.config import Section
from contradiff.evaluation.fid import fid
from contradiff.evaluation.kid import kid
from contradiff.evaluation.measuring import Measurement
from contradiff.evaluation.prdc import DENSITY_NEIGHBOUR, prdc

MIN_UNBIASED_IMAGES = 10_000
"""Fewer images give an FID that is much too large; the metrics then say that it is biased."""


class ScoreParams(Section):
    """Section `score`: how generated images are scored."""

    splits: int = Field(gt=0, description="parts of the images that the inception score averages")
    batch_size: int = Field(gt=0, description="images that the extractor sees at once")
    kid_subsets: int = Field(gt=0, description="random subsets that KID averages")
    kid_subset_size: int = Field(
        gt=DENSITY_NEIGHBOUR, description="images of each subset; precision needs as many"
    )


def scores_of(
    samples: Measurement,
    reference: Measurement,
    *,
    params: ScoreParams,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Score generated images by one extractor and one resizer.

    The inception score (Salimans et al., 2016) is torch-fidelity's, over contiguous splits, as in
    the first implementation: so the images must not come sorted by class.

    Args:
        samples: of the generated images, with logits.
        reference: of the real images, by the same extractor and resizer.
        params: the section `score`.
        seed: decides KID's subsets.
        device: where distances to neighbours are computed.

    Raises:
        ValueError: the measurements do not fit each other (`fid`), are too small (`kid`), or hold
            logits that are not finite.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert params.splits <= len(samples.logits), "the stage validate refuses this"
    if not bool(samples.logits.isfinite().all()):
        raise ValueError(f"the logits of {samples.statistics.source.images} hold NaN or infinities")
    kid_mean, kid_std = kid(
        samples.kept,
        reference.kept,
        num_subsets=params.kid_subsets,
        subset_size=params.kid_subset_size,
        seed=seed,
    )
    inception_score = isc_features_to_metric(samples.logits, splits=params.splits, shuffle=False)
    return {
        "fid": fid(samples.statistics, reference.statistics),
        "kid": kid_mean,
        "kid_std": kid_std,
        **prdc(samples.kept.to(device), reference.kept.to(device)),
        "inception_score": inception_score["inception_score_mean"],
        "inception_score_std": inception_score["inception_score_std"],
    }
