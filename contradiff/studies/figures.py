"""Figures of a study as SVG. The same results give the same bytes."""

import io
from collections.abc import Sequence
from math import nan
from typing import Any

from contradiff.studies.comparison import Comparison, Spread, spread
from contradiff.studies.study import Bubble, Row

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "contradiff",  # names inside the file would be random
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9dde3",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_INK = "#0b68cb"


def plot_rows(compared: Comparison, columns: Sequence[str]) -> str | None:
    """Draw columns over the rows: means with standard deviations, and each seed as a dot.

    Lines join the rows of each seed, and the means, if the rows change the same number, such as λ.
    """
    study = compared.study
    rows = [row for row in study.own_rows if any(compared.values(row, name) for name in columns)]
    if not rows:
        return None
    kinds = {str([*(row.set or {})]) for row in rows}
    values_of_rows = [value for row in rows for value in (row.set or {}).values()]
    is_line = len(kinds) == 1 and all(isinstance(each, int | float) for each in values_of_rows)
    slant = 30 if sum(len(row.title) for row in rows) > 28 else 0
    figure, axes = _figure(len(columns))
    for name, panel in zip(columns, axes, strict=True):
        column = study.columns[name]
        for place, row in enumerate(rows):
            values = compared.values(row, name)
            if (found := spread(values)) is None:
                continue
            panel.plot([place] * len(values), list(values.values()), ".", color="#8a94a3", ms=4)
            panel.errorbar(
                place, found.mean, yerr=found.std or 0, fmt="o", color=_INK, capsize=3, ms=5
            )
        means = [spread(compared.values(row, name)) for row in rows]
        line = [(place, each.mean) for place, each in enumerate(means) if each is not None]
        if is_line:
            for seed in study.seeds:
                own = [compared.values(row, name).get(seed, nan) for row in rows]
                panel.plot(range(len(rows)), own, color="#c3cad3", linewidth=0.8, zorder=1)
            panel.plot(*zip(*line, strict=True), color=_INK, linewidth=1.2)
        panel.set_title(column.heading, loc="left")
        titles = [row.title for row in rows]
        panel.set_xticks(
            range(len(rows)), titles, rotation=slant, ha="right" if slant else "center"
        )
        panel.margins(x=0.1)
        _in_percent(panel.yaxis, column.format)
    return _svg_of(figure)


def plot_bubbles(compared: Comparison, bubble: Bubble) -> str | None:
    """Draw two columns against each other, as in Fig. 1: areas are trainable parameters."""
    study = compared.study
    points: list[tuple[Row, Spread, Spread, float]] = []
    for row in study.own_rows:
        x, y = spread(compared.values(row, bubble.x)), spread(compared.values(row, bubble.y))
        sizes = [
            float(record.metrics["pretrain.trainable"])
            for seed in study.seeds
            if (record := compared.record(row, seed)) and "pretrain.trainable" in record.metrics
        ]
        if x and y and sizes:
            points.append((row, x, y, sizes[0]))
    if not points:
        return None
    figure, (panel,) = _figure(1, width=6.2, height=4.2)
    largest = max(size for *_, size in points)
    for number, (row, x, y, size) in enumerate(points):
        area, colour = 900 * size / largest, f"C{number % 10}"
        label = f"{row.title}: {size / 1e6:.2f}M"
        panel.scatter([x.mean], [y.mean], s=area, color=colour, alpha=0.45, label=label)
        ends = {"xerr": x.std or 0, "yerr": y.std or 0}
        panel.errorbar(x.mean, y.mean, **ends, fmt=".", color=colour, linewidth=0.8, ms=4)
    for name, axis, label in (
        (bubble.x, panel.xaxis, panel.set_xlabel),
        (bubble.y, panel.yaxis, panel.set_ylabel),
    ):
        label(study.columns[name].heading)
        _in_percent(axis, study.columns[name].format)
    panel.margins(0.25)
    legend = panel.legend(
        title="row: trainable parameters", loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    return _svg_of(figure)


def plot_training(compared: Comparison) -> str | None:
    """Draw the training curves of all rows on top of each other, averaged over seeds."""
    study = compared.study
    titles = {"reconstruction": "reconstruction loss", "contrastive": "contrastive loss"}
    panels: dict[str, list[tuple[str, str, list[float], list[float]]]] = {}
    panels |= {name: [] for name in titles}
    seen: set[str] = set()
    for row in study.own_rows:
        records = [each for seed in study.seeds if (each := compared.record(row, seed))]
        if row.read or not records or records[0].digest in seen:
            continue  # a row that reads other scores of an experiment than the rest
        colour = f"C{len(seen) % 10}"
        seen.add(records[0].digest)
        for name, lines in panels.items():
            curves = [each.curve for each in records if name in each.curve]
            steps = [curve["step"] for curve in curves]
            if curves and all(each == steps[0] for each in steps):
                columns = zip(*(curve[name] for curve in curves), strict=True)
                means = [sum(each) / len(each) for each in columns]
                lines.append((row.title, colour, steps[0], means))
    drawn = {name: lines for name, lines in panels.items() if lines}
    if not drawn:
        return None
    figure, axes = _figure(len(drawn))
    for (name, lines), panel in zip(drawn.items(), axes, strict=True):
        for title, colour, steps, values in lines:
            panel.plot(steps, values, linewidth=1.2, color=colour, label=title)
        panel.set_title(titles[name], loc="left")
        panel.set_xlabel("step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return _svg_of(figure)


def _figure(number: int, *, width: float = 3.6, height: float = 3.2) -> tuple[Any, list[Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width * number, height), layout="constrained")
        axes = list(figure.subplots(1, number, squeeze=False)[0])
    return figure, axes


def _in_percent(axis: Any, form: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if form.endswith("%"):
        axis.set_major_formatter(PercentFormatter(1.0))


def _svg_of(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Matplotlib ends lines with spaces, which git marks as faults.
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
