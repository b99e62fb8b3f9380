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

from contradiff.report.results import (
    OfShots,
    Results,
    SampleScores,
    ScoreMetrics,
    SeparabilityMetrics,
    TransferMetrics,
    fault,
    lookup,
    percent,
)

BIAS = "Fewer than 10,000 images bias it upwards; KID is not. "


@dataclass(frozen=True)
class Row:
    """One line of the table of results; a row with a `headline` also stands at the page's top."""

    name: str
    value: str
    detail: str
    headline: str = ""


def result_rows(results: Results) -> list[Row]:
    """The table of results: each score with its reference, extractor, count and seed.

    An FID of fewer than 10,000 images is marked as biased: its expectation falls as they grow.

    Raises:
        ValueError: build/pretrain/config.json names no `loss.lambda` or `lora.rank`.
    """
    pretrain, probe, score, seed = results.pretrain, results.probe, results.score, results.seed
    counts = pretrain.parameters
    accuracy = (
        ""
        if score.extractor_accuracy is None
        else f" (its accuracy: {percent(score.extractor_accuracy)})"
    )
    facts = (
        f"{score.num_samples:,} samples ({score.condition}; guidance {score.guidance:g}) against "
        f"{score.num_reference:,} reference images "
        f"({score.reference}; {score.reference_sha256[:8]}), extractor {score.extractor}"
        f"{accuracy}, seed {score.seed}"
    )
    rows = [
        Row("λ", _plain(lookup(pretrain.params, "loss.lambda")), "Weight of the contrastive loss"),
        Row("LoRA rank", _plain(lookup(pretrain.params, "lora.rank")), ""),
    ]
    for resizer, scores in score.by_resizer.items():
        rows += _sample_rows(score, scores, resizer=resizer, facts=f"{facts}, resizer {resizer}.")
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
    for shots, of_shots in results.transfer.by_shots.items():
        rows += _transfer_rows(results.transfer, shots, of_shots, seed=seed)
    rows += _separability_rows(results.separability)
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


def _sample_rows(
    score: ScoreMetrics, scores: SampleScores, *, resizer: str, facts: str
) -> list[Row]:
    """Scores by one resizer; the first one's FID and inception score head the page."""
    first = scores is score
    which = "" if first else f", {resizer}"
    mark, bias = (" (biased)", BIAS) if score.biased else ("", "")
    kept = f"On {score.num_kept:,} features a side; otherwise measured as the FID above."
    alone = (
        f"{score.num_samples:,} samples, no reference, classes of {score.extractor}, resizer "
        f"{resizer}, seed {score.seed}."
    )
    inception = f"{scores.inception_score:.2f} ± {scores.inception_score_std:.2f}"
    pairs = {
        f"Precision, recall{which} ↑": f"{scores.precision:.3f}, {scores.recall:.3f}",
        f"Density, coverage{which} ↑": f"{scores.density:.3f}, {scores.coverage:.3f}",
    }
    return [
        Row(f"FID{which} ↓", f"{scores.fid:.2f}{mark}", f"{bias}{facts}", "FID ↓" if first else ""),
        Row(f"KID{which} ↓", f"{scores.kid:.4f} ± {scores.kid_std:.4f}", kept),
        *(Row(name, value, kept) for name, value in pairs.items()),
        Row(f"Inception score{which} ↑", inception, alone, "Inception score ↑" if first else ""),
    ]


def _transfer_rows(
    transfer: TransferMetrics, shots: str, of_shots: OfShots, *, seed: int
) -> list[Row]:
    number = of_shots.num_splits
    over = f"Mean ± standard deviation over {number} splits" if number > 1 else "One split"
    taken = (
        f"Trained on all training images of {transfer.source}"
        if shots == "full"
        else f"{over} of {transfer.source}, {shots} images a class"
    )
    how = f"{taken}, {transfer.total:,} test images, seed {seed}."
    rows: list[Row] = []
    trained = {"ridge": of_shots.ridge, "SGD": of_shots.sgd, "fine-tuned": of_shots.finetuned}
    for name, result in trained.items():
        if result is not None:
            spread = "" if result.std is None else f" ± {percent(result.std)}"
            first = shots == str(transfer.shots)
            headline = "Transfer top-1 ↑" if first and name == "ridge" else ""
            title = f"Transfer top-1, {name}{'' if first else f', {shots} shots'} ↑"
            rows.append(Row(title, f"{percent(result.mean)}{spread}", how, headline))
    return rows


def _separability_rows(found: SeparabilityMetrics) -> list[Row]:
    how = (
        f"In feature space, cosine distance, {found.num_images:,} validation images of "
        f"{found.num_classes} classes, {found.num_neighbours} neighbours, each image left out."
    )
    return [
        Row(
            f"Separability, {name} ↑",
            f"kNN {percent(of.knn)}, silhouette "
            + ("not defined" if of.silhouette is None else f"{of.silhouette:.3f}"),
            how,
        )
        for name, of in (("features", found.contradiff), ("base alone", found.base))
    ]


def render_html(results: Results, *, loss: bytes, loss_dark: bytes) -> str:
    """The whole report as one file: images are data URIs, and its policy forbids any request.

    Args:
        results: from `read_results`.
        loss: PNG of the losses, for a light page.
        loss_dark: for a dark one.
    """
    pictures = {
        "samples": results.samples,
        "loss": loss,
        "loss_dark": loss_dark,
        "tsne": results.tsne,
        "tsne_dark": results.tsne_dark,
    }
    return _render("report.html", results, {name: _data_uri(png) for name, png in pictures.items()})


def render_markdown(results: Results) -> str:
    """The same report for a terminal or a code host; figures are links from build/report."""
    uris = {name: f"../figures/{name}.png" for name in ("samples", "loss", "tsne")}
    return _render("report.md", results, uris)


def summarise(rows: Sequence[Row], *, report: str) -> str:
    """JSON for programs: each result's name, and its value with how it was measured.

    Args:
        rows: as from `result_rows`.
        report: where the page lies, from the project's root.
    """
    pairs = [[row.name, f"{row.value} — {row.detail}" if row.detail else row.value] for row in rows]
    return json.dumps({"rows": pairs, "report": report}, indent=2, ensure_ascii=False) + "\n"


def _render(template: str, results: Results, uris: Mapping[str, str]) -> str:
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
        uris=uris,
        sections=_by_section(results.pretrain.params),
        records={
            "metrics/probe.json": _flatten(results.probe.model_dump(exclude_unset=True)),
            "metrics/transfer.json": _flatten(results.transfer.model_dump(exclude_unset=True)),
            "metrics/score.json": _flatten(results.score.model_dump(exclude_unset=True)),
            "metrics/separability.json": _flatten(results.separability.model_dump()),
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
