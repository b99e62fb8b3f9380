"""How well classes separate in feature space (Fig. 3), for the trained model and for its base.

A k-nearest-neighbour accuracy and a silhouette are computed from the features with cosine distance.
t-SNE only draws the features in the plane. In this drawing, distances between groups mean little.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from contradiff.downstream.params import SeparabilityParams
from contradiff.features.spread import check_spread
from contradiff.imports import slow_import


@dataclass(frozen=True)
class Separability:
    """How well the classes of one set of features separate.

    `knn`, in [0, 1], is the accuracy of a vote of each image's nearest other images. `silhouette`,
    in [-1, 1], is a mean over images, or None if there is one class, or one image per class.
    """

    knn: float
    silhouette: float | None

    def __str__(self) -> str:
        silhouette = "not defined" if self.silhouette is None else f"{self.silhouette:.3f}"
        return f"kNN {self.knn:.1%}, silhouette {silhouette} (in feature space)"


def choose_images(labels: Sequence[int], params: SeparabilityParams, *, seed: int) -> list[int]:
    """Draw classes, then images of these classes; return the images' indices, ascending.

    With too many classes, an image would have no neighbours of its own class. Raises ValueError if
    fewer than four images are left.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    if len(classes) > params.num_classes:
        classes = rng.choice(classes, params.num_classes, replace=False)
    chosen = np.flatnonzero(np.isin(labels, classes))
    if len(chosen) > params.num_images:
        chosen = np.sort(rng.choice(chosen, params.num_images, replace=False))
    if len(chosen) < 4:
        reason = f"{len(chosen)} validation images are too few for the stage `separability`"
        raise ValueError(f"data.root: {reason}; provide at least 4")
    return chosen.tolist()


def separability(
    features: Float[np.ndarray, "n width"], labels: Int[np.ndarray, " n"], *, num_neighbours: int
) -> Separability:
    """Measure features with the distance 1 - cosine. At most n - 1 neighbours vote.

    If several classes have the most votes, the smallest label wins. Raises ValueError if a feature
    vector is zero or not finite, or if all are the same.
    """
    with slow_import():
        from scipy.stats import mode
        from sklearn.metrics import silhouette_score
        from sklearn.neighbors import NearestNeighbors

    features = features.astype(np.float64)
    check_spread(torch.from_numpy(features), name="build/pretrain")
    if not np.linalg.norm(features, axis=1).all():
        raise ValueError(
            "build/pretrain: some features are zero, so the training diverged; see the losses in "
            "metrics/pretrain.csv, and lower pretrain.lr"
        )
    k = min(num_neighbours, len(labels) - 1)
    # Called without an argument, `kneighbors` does not count an image as its own neighbour.
    nearest = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features).kneighbors()[1]
    knn = float((mode(labels[nearest], axis=1).mode == labels).mean())
    if not 2 <= len(np.unique(labels)) < len(labels):
        return Separability(knn, None)
    return Separability(knn, float(silhouette_score(features, labels, metric="cosine")))


def embed(features: Float[np.ndarray, "n width"], *, seed: int) -> Float[np.ndarray, "n 2"]:
    """Map features to points of the plane by t-SNE with cosine distance.

    *Deviation*: 500 iterations instead of scikit-learn's 1,000, which take twice as long; the
    divergence that t-SNE lowers ends about 3% higher, and the drawing looks the same.
    """
    with slow_import():
        from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="pca", max_iter=500, random_state=seed)
    return np.asarray(tsne.fit_transform(features), dtype=np.float64)
