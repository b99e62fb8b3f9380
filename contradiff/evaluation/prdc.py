"""Precision, recall, density and coverage: fidelity and diversity apart, by nearest neighbours.

A set's manifold is the union of closed balls about its features, each as far as its k-th nearest
neighbour in the set.

features (n d) of both sets -> four numbers; distances exist in chunks of rows, in float64
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_CHUNK = 1024
"""Rows of a matrix of distances that exist at one time."""
PRECISION_NEIGHBOUR = 3
"""k of precision and recall (Kynkäänniemi et al., 2019)."""
DENSITY_NEIGHBOUR = 5
"""k of density and coverage (Naeem et al., 2020)."""


@dataclass(frozen=True)
class ManifoldScores:
    """How two sets of features lie in each other.

    Attributes:
        precision: part of the samples within the reference's manifold: realism.
        recall: part of the reference within the samples' manifold: diversity.
        density: mean number of the reference's balls about a sample, over k; may exceed 1.
        coverage: part of the reference's balls that hold a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(
    samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]
) -> ManifoldScores:
    """Precision and recall with k = 3, density and coverage with k = 5.

    They depend on how many features there are: compare equal counts only. Distances on a ball's
    border are inside, as Kynkäänniemi et al. write; Naeem et al.'s code leaves them out of density
    and coverage, which differs for exact ties alone.

    Args:
        samples: features of the generated images.
        reference: features of the real ones.

    Raises:
        ValueError: a set has no k-th neighbours.
    """
    needed = 1 + max(PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR)
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) < needed:
            raise ValueError(
                f"precision and coverage need {needed} images, the {name} have {len(features)} "
                "(generate.num_samples, reference.num_kept)"
            )
    # One shift for both changes no distance, and keeps the digits where the features' mean is far.
    mean = reference.double().mean(0)
    x, y = samples.double() - mean, reference.double() - mean
    [radii_x] = neighbour_distances(x, (PRECISION_NEIGHBOUR,))
    radii_y, wide_radii_y = neighbour_distances(y, (PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR))
    realistic = neighbours = 0
    recalled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    covered = torch.zeros_like(recalled)
    for rows, distances in _distances(x, y):
        realistic += int((distances <= radii_y).any(1).sum())
        recalled |= (distances <= radii_x[rows, None]).any(0)
        within = distances <= wide_radii_y
        neighbours += int(within.sum())
        covered |= within.any(0)
    return ManifoldScores(
        precision=realistic / len(x),
        recall=float(recalled.double().mean()),
        density=neighbours / (DENSITY_NEIGHBOUR * len(x)),
        coverage=float(covered.double().mean()),
    )


def neighbour_distances(
    features: Float64[Tensor, "n d"], neighbours: tuple[int, ...]
) -> tuple[Float64[Tensor, " n"], ...]:
    """Distance of each row to its k-th nearest other row, for each k of `neighbours`."""
    found: list[Tensor] = []
    for rows, distances in _distances(features, features):
        # itself is no neighbour, and rounding must not make it one
        index = torch.arange(rows.start, rows.stop, device=features.device)
        distances[index - rows.start, index] = torch.inf
        nearest = distances.topk(max(neighbours), dim=1, largest=False, sorted=True).values
        found.append(nearest[:, [k - 1 for k in neighbours]])
    return torch.cat(found).unbind(1)


def _distances(
    a: Float64[Tensor, "n d"], b: Float64[Tensor, "m d"]
) -> Iterator[tuple[slice, Float64[Tensor, "rows m"]]]:
    for start in range(0, len(a), _CHUNK):
        rows = slice(start, min(start + _CHUNK, len(a)))
        yield rows, torch.cdist(a[rows], b)
