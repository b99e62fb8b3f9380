"""Draws the two pictures of `python -m bench diagnostics` as PNGs."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

PANELS: Mapping[str, Mapping[str, str]] = {
    "alignment of two views ↓": {"h.alignment": "h", "maps.alignment": "maps"},
    "uniformity ↓": {"h.uniformity": "h", "maps.uniformity": "maps"},
    "effective rank ↑": {"h.effective_rank": "h", "maps.effective_rank": "maps"},
    "top-1, dev images ↑": {"h.top1": "h", "maps.top1": "maps"},
    "image found in its other view ↑": {"retrieval.null": "h"},
    "FID to training images ↓": {"fid": "samples"},
}
"""Title of a panel => column of diagnostics.json => name of the line."""


def plot_training(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Draw each measure over the steps of training; the best checkpoint of a line has a ring."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for (column, name), colour in zip(lines.items(), ("C0", "C1"), strict=False):
            steps = [row["step"] for row in rows if column in row]
            values = [row[column] for row in rows if column in row]
            axis.plot(steps, values, marker=".", color=colour, label=name)
            if values and ("top-1" in title or "FID" in title):
                best = (max if "↑" in title else min)(range(len(values)), key=values.__getitem__)
                axis.plot(steps[best], values[best], "o", mfc="none", ms=11, color=colour)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(visible=True, linewidth=0.4)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=9)
    figure.supxlabel("step of pretraining", fontsize=10)
    return _png_of(figure)


def plot_blocks(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> bytes:
    """Draw a heat map for each model: accuracy of each UNet block (row) and timestep (column)."""
    from matplotlib.figure import Figure

    scores = [top1 for rows in found.values() for row in rows.values() for top1 in row.values()]
    first = next(iter(found.values()))
    size = 1.2 + 0.5 * len(first[next(iter(first))]) * len(found), 1.0 + 0.42 * len(first)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    titles = {"base": "base alone", "contradiff": "after pretraining"}
    for axis, (kind, rows) in zip(axes, found.items(), strict=True):
        cells = [list(row.values()) for row in rows.values()]
        axis.imshow(cells, vmin=min(scores), vmax=max(scores), cmap="viridis", aspect="auto")
        for y, row in enumerate(cells):
            for x, top1 in enumerate(row):
                is_light = top1 > (min(scores) + max(scores)) / 2
                colour = "black" if is_light else "white"
                axis.text(x, y, f"{100 * top1:.0f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(cells[0])), [str(step) for step in first[next(iter(first))]])
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set_title(f"{titles[kind]}: top-1 in %, dev images", loc="left", fontsize=10)
        axis.set_xlabel("timestep")
    return _png_of(figure)


def _png_of(figure: Any) -> bytes:
    from PIL import Image

    buffer, palette = io.BytesIO(), io.BytesIO()
    # Without this, the file would name matplotlib's version.
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    Image.open(buffer).convert("RGB").quantize(128).save(palette, format="png", optimize=True)
    return palette.getvalue()
