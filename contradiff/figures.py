"""Figures of the report: losses over the steps, features in the plane."""

# scikit-learn, matplotlib and safetensors are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from contradiff.results import Results, percent

MAX_EMBEDDED_IMAGES = 1_000
MAX_EMBEDDED_CLASSES = 20
NUM_NEIGHBOURS = 10
_PANELS = {
    "loss": "total loss",
    "reconstruction": "reconstruction loss",
    "contrastive": "contrastive loss",
    "grad_norm": "gradient norm",
}


@dataclass(frozen=True)
class Embedding:
    """Validation features in the plane, and how well they separate before that.

    `knn_accuracy` in [0, 1] (leave one out) and `silhouette` in [-1, 1] are of the same images'
    original features under cosine distance. `silhouette` is None where it is not defined: with
    one class, or with as many classes as images.
    """

    positions: Float[np.ndarray, "points 2"]
    labels: Int[np.ndarray, " points"]
    num_classes: int
    num_images_total: int
    num_classes_total: int
    num_neighbours: int
    knn_accuracy: float
    silhouette: float | None
    seed: int

    @property
    def caption(self) -> str:
        """What the figure shows, with counts and seed."""
        silhouette = "not defined" if self.silhouette is None else f"{self.silhouette:.3f}"
        return (
            f"t-SNE of {len(self.labels):,} of {self.num_images_total:,} validation features, "
            f"{self.num_classes} of {self.num_classes_total:,} classes, seed {self.seed}. "
            f"On the same images' original features, under cosine distance: "
            f"{self.num_neighbours}-nearest-neighbour accuracy {percent(self.knn_accuracy)} "
            f"(leave one out; chance {percent(1 / self.num_classes)}), silhouette {silhouette}. "
            "Distances between groups mean little in a t-SNE."
        )


def embed_features(
    features: Float[np.ndarray, "images width"], labels: Int[np.ndarray, " images"], *, seed: int
) -> Embedding:
    """Lay features out in the plane with t-SNE, under cosine distance.

    Of many classes, 20 are drawn first, and then 1,000 of their images: a thousand images of a
    thousand classes would have no neighbours of their own.

    Raises:
        ValueError: fewer than four images, or features that are not finite.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    generator = np.random.default_rng(seed)
    all_classes = np.unique(labels)
    classes = all_classes
    if len(classes) > MAX_EMBEDDED_CLASSES:
        classes = generator.choice(classes, MAX_EMBEDDED_CLASSES, replace=False)
    chosen = np.flatnonzero(np.isin(labels, classes))
    if len(chosen) > MAX_EMBEDDED_IMAGES:
        chosen = np.sort(generator.choice(chosen, MAX_EMBEDDED_IMAGES, replace=False))
    points, point_labels = features[chosen], labels[chosen]
    if len(points) < 4:
        msg = f"data.num_val: {len(points)} validation images are too few to embed; take 4 or more"
        raise ValueError(msg)
    if not np.isfinite(points).all():
        msg = (
            "build/probe/features_val.safetensors: features are not finite; training diverged: "
            "see metrics/pretrain.csv, and lower pretrain.lr"
        )
        raise ValueError(msg)

    num_neighbours = min(NUM_NEIGHBOURS, len(points) - 1)
    # Asked without points, it leaves each point out of its own neighbours.
    index = NearestNeighbors(n_neighbors=num_neighbours, metric="cosine").fit(points)
    neighbours = point_labels[index.kneighbors(return_distance=False)]
    present, codes = np.unique(point_labels, return_inverse=True)
    votes = (neighbours[:, :, None] == present).sum(axis=1)
    knn_accuracy = float((votes.argmax(axis=1) == codes).mean())
    silhouette = None
    if 2 <= len(present) < len(points):
        silhouette = float(silhouette_score(points, point_labels, metric="cosine"))
    positions = TSNE(
        perplexity=min(30.0, (len(points) - 1) / 3),
        metric="cosine",
        init="pca",
        random_state=seed,
    ).fit_transform(points)
    return Embedding(
        positions=positions.astype(np.float64),
        labels=point_labels,
        num_classes=len(present),
        num_images_total=len(labels),
        num_classes_total=len(all_classes),
        num_neighbours=num_neighbours,
        knn_accuracy=knn_accuracy,
        silhouette=silhouette,
        seed=seed,
    )


def plot_losses(curve: Mapping[str, Float[np.ndarray, " rows"]], *, dark: bool) -> bytes:
    """Losses and gradient norm over the steps, a panel each, as a PNG.

    Args:
        curve: as in `Results`; a column that is NaN throughout gets no panel.
        dark: draw for a dark page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = {name: title for name, title in _PANELS.items() if np.isfinite(curve[name]).any()}
    with rc_context(_style(dark=dark)):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        axes = iter(figure.subplots(2, 2).flat)
        for (name, title), axis in zip(panels.items(), axes, strict=False):
            values = curve[name]
            dots = "." if len(values) < 20 else ""  # a line through one point shows nothing
            axis.plot(curve["step"], values, color="C0", alpha=0.35, linewidth=0.8, marker=dots)
            axis.plot(curve["step"], _smooth(values), color="C0", linewidth=1.8)
            axis.set_title(title, loc="left")
            axis.grid(visible=True, linewidth=0.5)
        for axis in axes:  # what zip left over
            axis.remove()
        figure.supxlabel(
            "step" if panels else "no training: pretrain.epochs is 0", fontsize="medium"
        )
        return _png(figure)


def plot_embedding(embedding: Embedding, *, dark: bool) -> bytes:
    """The embedding coloured by class, each class's label at its median point, as a PNG."""
    from matplotlib import colormaps, patheffects, rc_context
    from matplotlib.figure import Figure

    style = _style(dark=dark)
    colours = colormaps["tab20"]
    halo: list[patheffects.AbstractPathEffect] = [
        patheffects.withStroke(linewidth=3, foreground=style["axes.facecolor"])
    ]
    with rc_context(style):
        figure = Figure(figsize=(9, 7), layout="constrained")
        axis = figure.subplots()
        classes = [int(label) for label in np.unique(embedding.labels)]
        for place, label in enumerate(classes):
            points = embedding.positions[embedding.labels == label]
            colour = colours(2 * place % 20 + place // 10)  # the ten strong ones before the pale
            axis.scatter(points[:, 0], points[:, 1], s=16, color=colour, linewidths=0)
        for label in classes:
            x, y = np.median(embedding.positions[embedding.labels == label], axis=0)
            text = axis.text(x, y, str(label), ha="center", va="center", size=14, weight="bold")
            text.set_path_effects(halo)
        axis.set(xticks=[], yticks=[])
        axis.margins(0.02)
        axis.set_aspect("equal")
        axis.spines[:].set_visible(False)
        return _png(figure)


@dataclass(frozen=True)
class Figures:
    """PNGs for a light page, and for a dark one."""

    loss: bytes
    loss_dark: bytes
    tsne: bytes
    tsne_dark: bytes


def draw_figures(results: Results, embedding: Embedding) -> Figures:
    """Both figures in both colour schemes."""
    return Figures(
        loss=plot_losses(results.curve, dark=False),
        loss_dark=plot_losses(results.curve, dark=True),
        tsne=plot_embedding(embedding, dark=False),
        tsne_dark=plot_embedding(embedding, dark=True),
    )


def _smooth(values: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Centred moving average over about a twentieth of the rows, shorter at the ends."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _style(*, dark: bool) -> dict[Any, Any]:
    """Colours of the page's panels, so that a figure lies flush in the page."""
    from cycler import cycler

    paper, ink, line, accent = (
        ("#1a1f26", "#c3cad3", "#3a424d", "#5eb1ef")
        if dark
        else ("#ffffff", "#3d4450", "#d9dde3", "#0b68cb")
    )
    return {
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.edgecolor": line,
        "grid.color": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=[accent]),
        "font.size": 11.0,
        "figure.constrained_layout.h_pad": 0.1,
    }


def _png(figure: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    # Without the library's name and version: the same inputs, the same bytes.
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    # A diagram has few colours: a palette makes it a third as large, for the eye the same.
    palette = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(256).save(palette, format="png", optimize=True)
    return palette.getvalue()
