"""Draws figures as PNGs, in the colours of the light or the dark version of the page."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from contradiff.report.results import CURVES


def plot_losses(curve: Mapping[str, Float[np.ndarray, " rows"]], *, dark: bool) -> bytes:
    """Draw the training curves over the steps, as a PNG; columns that are all NaN are left out."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = {name: title for name, title in CURVES.items() if np.isfinite(curve[name]).any()}
    with rc_context(_page_style(dark=dark)):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        axes = iter(figure.subplots(2, 2).flat)
        for (name, title), axis in zip(panels.items(), axes, strict=False):
            values = curve[name]
            dots = "." if len(values) < 20 else ""  # a line of one point would be invisible
            axis.plot(curve["step"], values, color="C0", alpha=0.35, linewidth=0.8, marker=dots)
            # A moving average over a twentieth of the rows; the window is shorter at both ends.
            window, ones = np.ones(max(1, len(values) // 20)), np.ones(len(values))
            smooth = np.convolve(values, window, "same") / np.convolve(ones, window, "same")
            axis.plot(curve["step"], smooth, color="C0", linewidth=1.8)
            axis.set_title(title, loc="left")
            axis.grid(visible=True, linewidth=0.5)
        for axis in axes:  # panels without a curve
            axis.remove()
        label = "step" if panels else "no training: pretrain.epochs is 0"
        figure.supxlabel(label, fontsize="medium")
        return _png_of(figure)


def plot_embeddings(
    panels: Mapping[str, Float[np.ndarray, "n 2"]], labels: Int[np.ndarray, " n"], *, dark: bool
) -> bytes:
    """Draw several embeddings of the same images side by side, coloured by class, as a PNG.

    `panels` maps a title to the images' positions. A class's number is at the median of its images.
    """
    from matplotlib import colormaps, patheffects, rc_context
    from matplotlib.figure import Figure

    style, colours = _page_style(dark=dark), colormaps["tab20"]
    halo = patheffects.withStroke(linewidth=3, foreground=style["axes.facecolor"])
    with rc_context(style):
        figure = Figure(figsize=(6.2 * len(panels), 6.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for (title, positions), axis in zip(panels.items(), axes, strict=True):
            for place, label in enumerate(np.unique(labels)):
                points = positions[labels == label]
                colour = colours(2 * place % 20 + place // 10 % 2)  # the strong colours come first
                axis.scatter(points[:, 0], points[:, 1], s=14, color=colour, linewidths=0)
                x, y = np.median(points, axis=0)
                text = axis.text(x, y, str(label), ha="center", va="center", weight="bold")
                text.set_path_effects([halo])
            axis.set_title(title, loc="left")
            axis.set(xticks=[], yticks=[], xmargin=0.02, ymargin=0.02)
            axis.set_aspect("equal", adjustable="datalim")
            axis.spines[:].set_visible(False)
        return _png_of(figure)


def _page_style(*, dark: bool) -> dict[Any, Any]:
    """Return matplotlib settings with the colours of the page."""
    light_page = ("#ffffff", "#3d4450", "#d9dde3", "#0b68cb")
    dark_page = ("#1a1f26", "#c3cad3", "#3a424d", "#5eb1ef")
    paper, ink, line, accent = dark_page if dark else light_page
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(("text.color", "axes.titlecolor", "xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), line),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "axes.prop_cycle": f"cycler(color=['{accent}'])",
        "font.size": 11.0,
        "figure.constrained_layout.h_pad": 0.1,
    }


def _png_of(figure: Any) -> bytes:
    """Turn a matplotlib figure into a PNG; the same figure gives the same bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    # By default, the file would name matplotlib's version, and an update would change the bytes.
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    # A diagram has few colours, so a palette cuts the file to a third and looks the same.
    palette = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(48).save(palette, format="png", optimize=True)
    return palette.getvalue()
