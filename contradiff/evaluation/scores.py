"""All scores of generated images against a reference, from their features."""

from pydantic import Field
from torch import device as Device

from contradiff.config import Section
from contradiff.evaluation.fid import frechet_distance
from contradiff.evaluation.kid import kernel_distance
from contradiff.evaluation.measuring import FeatureSet
from contradiff.evaluation.prdc import manifold_scores

MIN_UNBIASED_IMAGES = 10_000
"""With fewer images a Fréchet distance comes out too large by much; it is then marked as biased."""


class ScoreParams(Section):
    """Section `score`: how generated images are scored."""

    splits: int = Field(gt=0, description="of the inception score")
    batch_size: int = Field(gt=0)
    kid_subsets: int = Field(gt=0, description="random subsets of KID")
    kid_subset_size: int = Field(ge=2, description="images of each")


def is_biased(num_samples: int, num_reference: int) -> bool:
    """Whether there are too few images to compare the Fréchet distance with others' counts."""
    return min(num_samples, num_reference) < MIN_UNBIASED_IMAGES


def scores_of(
    samples: FeatureSet,
    reference: FeatureSet,
    *,
    kid_subsets: int,
    kid_subset_size: int,
    seed: int,
    device: Device,
) -> dict[str, float]:
    """Score generated images, seen through one extractor and one resizer.

    Args:
        samples: of the generated images, with sums for the inception score.
        reference: of the real ones, of the same extractor and resizer.
        kid_subsets: random subsets of KID.
        kid_subset_size: images of each.
        seed: of the subsets.
        device: where kernels and distances are computed.

    Returns:
        fid, kid, kid_std, precision, recall, density, coverage, inception_score and
        inception_score_std.

    Raises:
        ValueError: the features are of different kinds, or there are too few.
    """
    assert samples.sums is not None, "generated images without sums for the inception score"
    fid = frechet_distance(samples.statistics, reference.statistics)
    x, y = samples.kept.to(device), reference.kept.to(device)
    kid, kid_std = kernel_distance(
        x, y, num_subsets=kid_subsets, subset_size=kid_subset_size, seed=seed
    )
    manifold = manifold_scores(x, y)
    mean, std = samples.sums.score()
    return {
        "fid": fid,
        "kid": kid,
        "kid_std": kid_std,
        "precision": manifold.precision,
        "recall": manifold.recall,
        "density": manifold.density,
        "coverage": manifold.coverage,
        "inception_score": mean,
        "inception_score_std": std,
    }
