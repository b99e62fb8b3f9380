"""How well classes separate in feature space (Fig. 3): the trained model beside its own base.

Both numbers are taken in the space of the features, under cosine distance. The t-SNE shows the same
features in the plane, where distances between groups mean little: nothing is measured there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, model_validator

from contradiff.config import Section


class SeparabilityParams(Section):
    """Section `separability`: what Fig. 3 shows. The paper names neither images nor classes."""

    num_images: int = Field(ge=4, description="validation images at most, of the chosen classes")
    num_classes: int = Field(ge=2, description="classes at most; drawn if there are more")
    num_neighbours: int = Field(ge=1, description="k of the nearest-neighbour vote")

    @model_validator(mode="after")
    def _neighbours_are_other_images(self) -> "SeparabilityParams":
        if self.num_neighbours >= self.num_images:
            raise ValueError(
                f"separability.num_neighbours: must be less than separability.num_images "
                f"{self.num_images} (got {self.num_neighbours})"
            )
        return self


@dataclass(frozen=True)
class Separability:
    """How well the classes of one set of features separate.

    `knn` is the accuracy in [0, 1] of a vote of the nearest other images, `silhouette` the mean in
    [-1, 1]; None with one class, or with as many classes as images.
    """

    knn: float
    silhouette: float | None

    def __str__(self) -> str:
        silhouette = "not defined" if self.silhouette is None else f"{self.silhouette:.3f}"
        return f"kNN {self.knn:.1%}, silhouette {silhouette} (in feature space)"


def choose_images(labels: Sequence[int], params: SeparabilityParams, *, seed: int) -> list[int]:
    """Draw classes, then images of them, ascending; ValueError if there are fewer than four.

    A thousand images of a thousand classes would have no neighbours of their own.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    if len(classes) > params.num_classes:
        classes = rng.choice(classes, params.num_classes, replace=False)
    chosen = np.flatnonzero(np.isin(labels, classes))
    if len(chosen) > params.num_images:
        chosen = np.sort(rng.choice(chosen, params.num_images, replace=False))
    if len(chosen) < 4:
        reason = f"{len(chosen)} validation images are too few to separate"
        raise ValueError(f"data.root: {reason}; take 4 or more")
    return chosen.tolist()


def separability(
    features: Float[np.ndarray, "n width"], labels: Int[np.ndarray, " n"], *, num_neighbours: int
) -> Separability:
    """Measure features under cosine distance 1 - cos, with at most n - 1 neighbours.

    Of classes with as many votes the first one wins. Features that are zero or not finite are a
    ValueError.
    """
    from scipy.stats import mode
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    features = features.astype(np.float64)
    norms = np.linalg.norm(features, axis=1)
    if not np.isfinite(norms).all() or not norms.all():
        raise ValueError(
            "build/pretrain: features are not finite, or zero; training diverged: see "
            "metrics/pretrain.csv, and lower pretrain.lr"
        )
    k = min(num_neighbours, len(labels) - 1)
    # Without an argument, `kneighbors` leaves each image out of its own neighbours.
    nearest = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features).kneighbors()[1]
    knn = float((mode(labels[nearest], axis=1).mode == labels).mean())
    if not 2 <= len(np.unique(labels)) < len(labels):
        return Separability(knn, None)
    return Separability(knn, float(silhouette_score(features, labels, metric="cosine")))


def embed(features: Float[np.ndarray, "n width"], *, seed: int) -> Float[np.ndarray, "n 2"]:
    """Embed features in the plane by t-SNE, under cosine distance."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
    return np.asarray(tsne.fit_transform(features), dtype=np.float64)
