"""Precision, recall, density and coverage: realism and diversity apart, by nearest neighbours.

A set's manifold is the union of balls about its features. Each ball reaches to the k-th nearest
neighbour in the set.

features (n d) of both sets => four numbers
"""

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 1024
"""Rows of a matrix of distances that exist at one time."""
PRECISION_NEIGHBOUR = 3
"""k of precision and recall (Kynkäänniemi et al., 2019)."""
DENSITY_NEIGHBOUR = 5
"""k of density and coverage (Naeem et al., 2020)."""


def prdc(samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]) -> dict[str, float]:
    """Precision and recall by torch-fidelity, density and coverage by us.

    They depend on the number of features: compare equal counts only. A distance that equals a
    ball's radius is inside, as Kynkäänniemi et al. write. *Deviation*: Naeem et al.'s code leaves
    such exact ties out of density and coverage.

    Returns:
        precision: part of the samples within the reference's manifold: realism.
        recall: part of the reference within the samples' manifold: diversity.
        density: how many of the reference's balls hold a sample, on average, over k; may exceed 1.
        coverage: part of the reference's balls that hold a sample.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    assert min(len(samples), len(reference)) > DENSITY_NEIGHBOUR, "see ScoreParams"
    # One shift for both sets changes no distance, and keeps the digits if the mean is far from 0.
    mean = reference.double().mean(0)
    x, y = samples.double() - mean, reference.double() - mean
    found = prc_features_to_metric(
        x,
        y,
        prc_neighborhood=PRECISION_NEIGHBOUR,
        prc_batch_size=_CHUNK,
        save_cpu_ram=True,
        verbose=False,
    )
    # A feature is its own first neighbour.
    radii = torch.cat(
        [torch.cdist(rows, y).kthvalue(DENSITY_NEIGHBOUR + 1).values for rows in y.split(_CHUNK)]
    )
    num_within = 0
    covered = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for rows in x.split(_CHUNK):
        within = torch.cdist(rows, y) <= radii
        num_within += int(within.sum())
        covered |= within.any(0)
    return {
        "precision": found["precision"],
        "recall": found["recall"],
        "density": num_within / (DENSITY_NEIGHBOUR * len(x)),
        "coverage": float(covered.double().mean()),
    }
