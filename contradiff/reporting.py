"""The report: every number of a run with the way it was measured, on one self-contained page.

Along the data's way: `results.read_results` (files => values) => `result_rows` (values => table),
`figures` (values => pictures) => `render_html`, `render_markdown`. Nothing here trains, downloads
or imports torch, and the same inputs give the same report: it holds no date and no host name.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contradiff.figures import Embedding, Figures
from contradiff.results import Results, fault, lookup, percent

MIN_UNBIASED_SAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """One line of the table of results; a row with a `headline` also stands at the page's top."""

    name: str
    value: str
    detail: str
    headline: str = ""


def result_rows(results: Results) -> list[Row]:
    """The table of results: each score with its reference, extractor, count and seed.

    An FID of fewer than 10,000 samples is marked as biased: its expectation falls as they grow.

    Raises:
        ValueError: build/pretrain/config.json names no `loss.lambda` or `lora.rank`.
    """
    pretrain, probe, score, seed = results.pretrain, results.probe, results.score, results.seed
    counts = pretrain.parameters
    biased = score.num_samples < MIN_UNBIASED_SAMPLES
    bias = f"Fewer than {MIN_UNBIASED_SAMPLES:,} samples bias it upwards. " if biased else ""
    accuracy = (
        ""
        if score.extractor_accuracy is None
        else f" (its accuracy: {percent(score.extractor_accuracy)})"
    )
    compared = (
        f"{score.num_samples:,} samples ({score.condition}; guidance {score.guidance:g}) against "
        f"{score.num_reference:,} reference images "
        f"({score.reference}), extractor {score.extractor}{accuracy}, resizer {score.resizer}, "
        f"seed {score.seed}."
    )
    rows = [
        Row("λ", _plain(lookup(pretrain.params, "loss.lambda")), "Weight of the contrastive loss"),
        Row("LoRA rank", _plain(lookup(pretrain.params, "lora.rank")), ""),
        Row(
            "FID ↓",
            f"{score.fid:.2f}{' (biased)' if biased else ''}",
            f"{bias}{compared}",
            "FID ↓",
        ),
        Row(
            "Inception score ↑",
            f"{score.inception_score:.2f} ± {score.inception_score_std:.2f}",
            f"{score.num_samples:,} samples, no reference, classes of {score.extractor}"
            f"{accuracy}, resizer {score.resizer}, seed {score.seed}.",
            "Inception score ↑",
        ),
    ]
    if score.kid is not None:
        spread = "" if score.kid_std is None else f" ± {score.kid_std:.4f}"
        rows.append(Row("KID ↓", f"{score.kid:.4f}{spread}", compared))
    judged = f"{probe.total:,} images of split {probe.split}"
    setting = f"{probe.head} head on {probe.pool} features, seed {seed}."
    low, high = probe.interval
    rows += [
        Row(
            "Probe top-1 ↑",
            f"{percent(probe.top1)} [{percent(low)}, {percent(high)}]",
            f"95% interval; {judged}, {setting}",
            "Probe top-1 ↑",
        ),
        Row("Probe top-5 ↑", percent(probe.top5), f"{judged}, {setting}"),
    ]
    transfer = results.transfer
    few_shot = (
        f"Mean ± standard deviation over {transfer.num_splits} splits of {transfer.source}, "
        f"{transfer.shots} images a class, {transfer.total:,} test images, seed {seed}."
    )
    for name, result in (("ridge", transfer.ridge), ("SGD", transfer.sgd)):
        spread = "" if result.std is None else f" ± {percent(result.std)}"
        rows.append(
            Row(
                f"Transfer top-1, {name} ↑",
                f"{percent(result.mean)}{spread}",
                few_shot,
                "Transfer top-1 ↑" if name == "ridge" else "",
            )
        )
    total = counts.trainable + counts.frozen
    rows += [
        Row(
            "Trainable parameters",
            f"{counts.trainable:,}",
            f"{percent(counts.trainable / max(total, 1))} of {total:,} in all; "
            f"{counts.frozen:,} are frozen.",
            "Trainable parameters",
        ),
        Row("Pretraining steps", f"{pretrain.num_steps:,}", f"Seed {seed}."),
    ]
    return rows


def render_html(results: Results, embedding: Embedding, figures: Figures) -> str:
    """The whole report as one file: images are data URIs, and its policy forbids any request."""
    uris = {
        "samples": _data_uri(results.samples),
        "loss": _data_uri(figures.loss),
        "loss_dark": _data_uri(figures.loss_dark),
        "tsne": _data_uri(figures.tsne),
        "tsne_dark": _data_uri(figures.tsne_dark),
    }
    return _render("report.html", results, embedding, uris)


def render_markdown(results: Results, embedding: Embedding) -> str:
    """The same report for a terminal or a code host; figures are links from build/report."""
    uris = {name: f"../figures/{name}.png" for name in ("samples", "loss", "tsne")}
    return _render("report.md", results, embedding, uris)


def summarise(rows: Sequence[Row], *, report: str) -> str:
    """JSON for programs: each result's name, and its value with how it was measured.

    Args:
        rows: as from `result_rows`.
        report: where the page lies, from the project's root.
    """
    pairs = [[row.name, f"{row.value} — {row.detail}" if row.detail else row.value] for row in rows]
    return json.dumps({"rows": pairs, "report": report}, indent=2, ensure_ascii=False) + "\n"


def _render(template: str, results: Results, embedding: Embedding, uris: Mapping[str, str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    rows = result_rows(results)
    return environment.get_template(template).render(
        rows=rows,
        headlines=[row for row in rows if row.headline],
        results=results,
        embedding=embedding,
        uris=uris,
        sections=_by_section(results.pretrain.params),
        records={
            "metrics/probe.json": _flatten(results.probe.model_dump(exclude_unset=True)),
            "metrics/transfer.json": _flatten(results.transfer.model_dump(exclude_unset=True)),
            "metrics/score.json": _flatten(results.score.model_dump(exclude_unset=True)),
        },
        rank=_plain(lookup(results.pretrain.params, "lora.rank")),
        weight=_plain(lookup(results.pretrain.params, "loss.lambda")),
        small_samples=_png_width(results.samples) < 900,
    )


def _flatten(tree: Mapping[str, Any], *, prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys => (dotted key, value as text), in the file's order."""
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, prefix=f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", _plain(value)))
    return pairs


def _by_section(params: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections with their keys; top-level values, such as the seed, form a first one, "general"."""
    general = {key: value for key, value in params.items() if not isinstance(value, Mapping)}
    sections = [("general", _flatten(general))] if general else []
    return sections + [
        (key, _flatten(value)) for key, value in params.items() if isinstance(value, Mapping)
    ]


def _plain(value: object) -> str:
    """A value as params.yaml writes it; lists in one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    return json.dumps(value)


def _cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _png_width(png: bytes) -> int:
    """Width in pixels; small pictures are enlarged with hard edges on the page."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return image.width
    except UnidentifiedImageError:
        raise ValueError(fault("build/figures/samples.png", "not a PNG")) from None
