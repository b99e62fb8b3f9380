"""The report as a page, in Markdown and as JSON; the same inputs give the same bytes."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contradiff.report.results import (
    PRETRAIN_FILE,
    PretrainRecord,
    ProbeRecord,
    ResizerScores,
    RunResults,
    ScoreRecord,
    SeparabilityRecord,
    TransferRecord,
    fault,
)


@dataclass(frozen=True)
class TableRow:
    """A line of the table of results; one with a `headline` also stands at the top of the page."""

    name: str
    value: str
    detail: str
    headline: str = ""


def result_rows(results: RunResults) -> list[TableRow]:
    """Make the table of results: each score with its reference, extractor, count and seed.

    Raises:
        ValueError: build/pretrain/config.json lacks `loss.lambda` or `lora.rank`.
    """
    settings = _settings(results.pretrain)
    return [
        TableRow("λ", settings["loss.lambda"], "Weight of the contrastive loss"),
        TableRow("LoRA rank", settings["lora.rank"], ""),
        *_score_rows(results.score),
        *_probe_rows(results.probe, seed=results.seed),
        *_transfer_rows(results.transfer, seed=results.seed),
        *_separability_rows(results.separability),
        *_training_rows(results.pretrain, seed=results.seed),
    ]


def _score_rows(score: ScoreRecord) -> Iterator[TableRow]:
    accuracy = score.extractor_accuracy
    known = "" if accuracy is None else f" (its accuracy: {_percent(accuracy)})"
    compared = (
        f"{score.num_samples:,} samples ({score.condition}; guidance {score.guidance:g}) against "
        f"{score.num_reference:,} reference images "
        f"({score.reference}; {score.reference_sha256[:8]}), extractor {score.extractor}"
        f"{known}, seed {score.seed}"
    )
    # FID's expectation falls as the number of images grows.
    bias = "Fewer than 10,000 images bias the FID upwards; the KID has no bias. "
    kept = f"On {score.num_kept:,} features a side; otherwise measured as the FID above."
    others = {
        name: ResizerScores.model_validate(value)
        for name, value in (score.model_extra or {}).items()
        if isinstance(value, Mapping)
    }
    for resizer, scores in {score.resizer: score, **others}.items():
        first = scores is score
        which = "" if first else f", {resizer}"
        yield TableRow(
            f"FID{which} ↓",
            f"{scores.fid:.2f}{' (biased)' if score.biased else ''}",
            f"{bias if score.biased else ''}{compared}, resizer {resizer}.",
            "FID ↓" if first else "",
        )
        yield TableRow(f"KID{which} ↓", f"{scores.kid:.4f} ± {scores.kid_std:.4f}", kept)
        pair = f"{scores.precision:.3f}, {scores.recall:.3f}"
        yield TableRow(f"Precision, recall{which} ↑", pair, kept)
        pair = f"{scores.density:.3f}, {scores.coverage:.3f}"
        yield TableRow(f"Density, coverage{which} ↑", pair, kept)
        yield TableRow(
            f"Inception score{which} ↑",
            f"{scores.inception_score:.2f} ± {scores.inception_score_std:.2f}",
            f"{score.num_samples:,} samples, no reference, classes of {score.extractor}, resizer "
            f"{resizer}, seed {score.seed}.",
            "Inception score ↑" if first else "",
        )


def _probe_rows(probe: ProbeRecord, *, seed: int) -> Iterator[TableRow]:
    low, high = (_percent(bound) for bound in probe.interval)
    how = (
        f"{probe.total:,} images of split {probe.split}, "
        f"{probe.head} head on {probe.pool} features, seed {seed}."
    )
    name, value = "Probe top-1 ↑", f"{_percent(probe.top1)} [{low}, {high}]"
    yield TableRow(name, value, f"95% interval; {how}", headline=name)
    yield TableRow("Probe top-5 ↑", _percent(probe.top5), how)


def _transfer_rows(transfer: TransferRecord, *, seed: int) -> Iterator[TableRow]:
    for shots, record in transfer.by_shots.items():
        number, source = record.num_splits, transfer.source
        over = f"Mean ± standard deviation over {number} splits" if number > 1 else "One split"
        taken = f"{over} of {source}, {shots} images a class"
        if shots == "full":
            taken = f"Trained on all training images of {source}"
        is_main = shots == str(transfer.shots)
        which = "" if is_main else f", {shots} shots"
        trained = {"ridge": record.ridge, "SGD": record.sgd, "fine-tuned": record.finetuned}
        for name, result in trained.items():
            if result is not None:
                spread = "" if result.std is None else f" ± {_percent(result.std)}"
                yield TableRow(
                    f"Transfer top-1, {name}{which} ↑",
                    f"{_percent(result.mean)}{spread}",
                    f"{taken}, {transfer.total:,} test images, seed {seed}.",
                    "Transfer top-1 ↑" if is_main and name == "ridge" else "",
                )


def _separability_rows(found: SeparabilityRecord) -> Iterator[TableRow]:
    how = (
        f"In feature space, cosine distance, {found.num_images:,} validation images of "
        f"{found.num_classes} classes, {found.num_neighbours} neighbours, each image left out."
    )
    for name, features in (("features", found.contradiff), ("base alone", found.base)):
        silhouette = features.silhouette
        shown = "not defined" if silhouette is None else f"{silhouette:.3f}"
        value = f"kNN {_percent(features.knn)}, silhouette {shown}"
        yield TableRow(f"Separability, {name} ↑", value, how)


def _training_rows(pretrain: PretrainRecord, *, seed: int) -> Iterator[TableRow]:
    trainable, frozen = pretrain.parameters.trainable, pretrain.parameters.frozen
    total = trainable + frozen
    share = _percent(trainable / max(total, 1))
    how = f"{share} of {total:,} in all; {frozen:,} are frozen."
    name = "Trainable parameters"
    yield TableRow(name, f"{trainable:,}", how, headline=name)
    yield TableRow("Pretraining steps", f"{pretrain.num_steps:,}", f"Seed {seed}.")


def render_html(results: RunResults, *, loss: bytes, loss_dark: bytes) -> str:
    """Make the page: one file that holds its images and forbids the browser every request.

    Args:
        results: From `read_results`.
        loss: Figure of the losses for a light page, a PNG.
        loss_dark: The same for a dark page.
    """
    pngs = {
        "samples": results.samples,
        "loss": loss,
        "loss_dark": loss_dark,
        "tsne": results.tsne,
        "tsne_dark": results.tsne_dark,
    }
    urls = {
        name: f"data:image/png;base64,{base64.b64encode(png).decode()}"
        for name, png in pngs.items()
    }
    return _render("report.html", results, urls)


def render_markdown(results: RunResults) -> str:
    """Make the same report for a terminal or a code host; it links figures from build/report."""
    urls = {name: f"../figures/{name}.png" for name in ("samples", "loss", "tsne")}
    return _render("report.md", results, urls)


def summarise(rows: Iterable[TableRow], *, report: str) -> str:
    """Make JSON for programs: each result's name, and its value with how it was measured.

    Args:
        rows: From `result_rows`.
        report: Path of the page, relative to the project's folder.
    """
    pairs = [[row.name, f"{row.value} — {row.detail}" if row.detail else row.value] for row in rows]
    return json.dumps({"rows": pairs, "report": report}, indent=2, ensure_ascii=False) + "\n"


def _render(template: str, results: RunResults, urls: Mapping[str, str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _escape_cell
    rows, settings = result_rows(results), _settings(results.pretrain)
    sections = {"general": {key: text for key, text in settings.items() if "." not in key}}
    for name, section in results.pretrain.params.items():
        if isinstance(section, Mapping):
            sections[name] = _flatten(section)
    records = (
        (stage, getattr(results, stage).model_dump(exclude_unset=True))
        for stage in ("probe", "transfer", "score", "separability")
    )
    return environment.get_template(template).render(
        rows=rows,
        headlines=[row for row in rows if row.headline],
        results=results,
        urls=urls,
        settings=settings,
        sections=sections,
        records={f"metrics/{stage}.json": _flatten(record) for stage, record in records},
        small_samples=int.from_bytes(results.samples[16:20]) < 900,  # a PNG's width
    )


def _settings(pretrain: PretrainRecord) -> dict[str, str]:
    """Parameters by their dotted keys."""
    settings = _flatten(pretrain.params)
    for key in ("loss.lambda", "lora.rank"):
        if key not in settings:
            raise ValueError(fault(PRETRAIN_FILE, f"params.{key}: missing"))
    return settings


def _flatten(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, prefix=f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: object) -> str:
    """A value as params.yaml shows it, but a list in one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return json.dumps(value)


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
