"""How well classes separate in feature space (Fig. 3): the trained model beside its own base.

Both numbers are taken in the space of the features, under cosine distance. The t-SNE shows the same
features in the plane, where distances between groups mean little: nothing is measured there.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64
from pydantic import Field, model_validator

from contradiff.config import Section
from contradiff.data.shards import read_images
from contradiff.method.lora import disable_lora
from contradiff.method.model import ContraDiff
from contradiff.report.figures import page_style, png_of


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
    """Of one set of features, in feature space.

    Attributes:
        knn: accuracy in [0, 1] of a vote of the nearest neighbours, each image left out of its own.
        silhouette: mean silhouette in [-1, 1]; None where it is not defined: with one class, or
            with as many classes as images.
    """

    knn: float
    silhouette: float | None


@dataclass(frozen=True)
class Panel:
    """One half of the figure."""

    title: str
    positions: Float[np.ndarray, "n 2"]
    separability: Separability


def choose_images(
    labels: Sequence[int], *, num_images: int, num_classes: int, seed: int
) -> list[int]:
    """Draw classes, then images of them; all, if there are not more.

    A thousand images of a thousand classes would have no neighbours of their own.

    Args:
        labels: classes of all images.
        num_images: at most.
        num_classes: at most.
        seed: of both draws.

    Returns:
        Indices into `labels`, ascending.

    Raises:
        ValueError: fewer than four images.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    if len(classes) > num_classes:
        classes = rng.choice(classes, num_classes, replace=False)
    chosen = np.flatnonzero(np.isin(labels, classes))
    if len(chosen) > num_images:
        chosen = np.sort(rng.choice(chosen, num_images, replace=False))
    if len(chosen) < 4:
        raise ValueError(
            f"data.root: {len(chosen)} validation images are too few to separate; take 4 or more"
        )
    return chosen.tolist()


def labels_of(images: Path, *, split: str) -> list[int]:
    """Classes of a split's images, in order; nothing is decoded."""
    return [sample.label for sample in read_images(images, split)]


def base_of(model: ContraDiff) -> ContraDiff:
    """The base's own features: a copy without LoRA, with all-zero tokens, read at the mid block.

    This is the model as it stands before any training, so that `extract` with pool "mean" gives
    the base's pooled bottleneck (Table 3's SD features), at the same noise.
    """
    base = copy.deepcopy(model)
    disable_lora(base.unet)
    for parameter in base.conditioner.to_tokens.parameters():
        parameter.data.zero_()
    base.self_condition = None
    base.block = "mid"
    return base.eval()


def separability(
    features: Float[np.ndarray, "n width"], labels: Int[np.ndarray, " n"], *, num_neighbours: int
) -> Separability:
    """Both numbers of features, under cosine distance 1 - cos.

    Args:
        features: two images at least.
        labels: their classes.
        num_neighbours: k; at most n - 1 are there. Of classes with as many votes the first wins.

    Raises:
        ValueError: features are not finite, or zero; training diverged.
    """
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise ValueError(
            "build/pretrain: features are not finite, or zero; training diverged: see "
            "metrics/pretrain.csv, and lower pretrain.lr"
        )
    units = features / norms
    distances = np.clip(1.0 - units @ units.T, 0.0, 2.0)
    classes, codes = np.unique(labels, return_inverse=True)
    members = codes[:, None] == np.arange(len(classes))

    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    nearest = others.argsort(axis=1, kind="stable")[:, : min(num_neighbours, len(labels) - 1)]
    votes = members[nearest].sum(axis=1)
    knn = float((votes.argmax(axis=1) == codes).mean())
    if not 2 <= len(classes) < len(labels):
        return Separability(knn, None)
    return Separability(knn, _silhouette(distances, codes, members))


def _silhouette(
    distances: Float[np.ndarray, "n n"],
    codes: Int[np.ndarray, " n"],
    members: Any,
) -> float:
    """Mean of (b - a) / max(a, b): a to the own class's others, b to the nearest other class."""
    np.fill_diagonal(distances, 0.0)
    rows = np.arange(len(codes))
    sizes = members.sum(axis=0)
    sums = distances @ members
    own_size = sizes[codes]
    own = sums[rows, codes] / np.maximum(own_size - 1, 1)
    means = sums / sizes
    means[rows, codes] = np.inf
    other = means.min(axis=1)
    greater = np.maximum(own, other)
    values = np.divide(other - own, greater, out=np.zeros_like(own), where=greater > 0)
    return float(np.where(own_size > 1, values, 0.0).mean())


def embed(features: Float[np.ndarray, "n width"], *, seed: int) -> Float[np.ndarray, "n 2"]:
    """t-SNE in the plane, under cosine distance."""
    from sklearn.manifold import TSNE

    positions = TSNE(
        perplexity=min(30.0, (len(features) - 1) / 3),
        metric="cosine",
        init="pca",
        random_state=seed,
    ).fit_transform(features)
    return np.asarray(positions, dtype=np.float64)


def plot_panels(panels: Sequence[Panel], labels: Int64[np.ndarray, " n"], *, dark: bool) -> bytes:
    """The embeddings side by side, coloured by class, each with its numbers, as a PNG.

    Args:
        panels: of the same images.
        labels: their classes; a class's number stands at its median point.
        dark: for a dark page.
    """
    from matplotlib import colormaps, patheffects, rc_context
    from matplotlib.figure import Figure

    style = page_style(dark=dark)
    colours = colormaps["tab20"]
    halo: list[patheffects.AbstractPathEffect] = [
        patheffects.withStroke(linewidth=3, foreground=style["axes.facecolor"])
    ]
    with rc_context(style):
        figure = Figure(figsize=(6.2 * len(panels), 6.4), layout="constrained")
        for panel, axis in zip(
            panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True
        ):
            for place, label in enumerate(np.unique(labels)):
                points = panel.positions[labels == label]
                colour = colours(2 * place % 20 + place // 10 % 2)  # strong ones before the pale
                axis.scatter(points[:, 0], points[:, 1], s=14, color=colour, linewidths=0)
                x, y = np.median(points, axis=0)
                text = axis.text(x, y, str(label), ha="center", va="center", weight="bold")
                text.set_path_effects(halo)
            axis.set_title(_title(panel), loc="left")
            axis.set(xticks=[], yticks=[])
            axis.margins(0.02)
            axis.set_aspect("equal", adjustable="datalim")
            axis.spines[:].set_visible(False)
        return png_of(figure)


def _title(panel: Panel) -> str:
    found = panel.separability
    silhouette = "not defined" if found.silhouette is None else f"{found.silhouette:.3f}"
    return f"{panel.title}\nkNN {found.knn:.1%}, silhouette {silhouette} (in feature space)"


def separability_metrics(
    found: Mapping[str, Separability], *, num_images: int, num_classes: int, num_neighbours: int
) -> dict[str, Any]:
    """What metrics/separability.json holds under `separability`."""
    return {
        **{name: {"knn": each.knn, "silhouette": each.silhouette} for name, each in found.items()},
        "num_images": num_images,
        "num_classes": num_classes,
        "num_neighbours": num_neighbours,
    }
