"""The report as a page, in Markdown and as JSON; the same inputs give the same bytes."""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from contradiff.report.results import PRETRAIN_FILE, ResizerScores, RunResults, ScoreRecord, fault


class TableRow(NamedTuple):
    """A row of the table of results; one with a `headline` also stands at the top of the page."""

    name: str
    value: str
    detail: str
    headline: str = ""


def result_rows(results: RunResults) -> Iterator[TableRow]:
    """Make the table of results: each score with its reference, extractor, count and seed.

    Raises:
        ValueError: build/pretrain/config.json lacks `loss.lambda` or `lora.rank`.
    """
    settings, seed = _flatten(results.pretrain.params), results.seed
    for key in ("loss.lambda", "lora.rank"):
        if key not in settings:
            raise ValueError(fault(PRETRAIN_FILE, f"params.{key}: missing"))
    yield TableRow("λ", settings["loss.lambda"], "Weight of the contrastive loss")
    yield TableRow("LoRA rank", settings["lora.rank"], "")
    yield from _score_rows(results.score)

    probe = results.probe
    low, high = probe.interval
    how = (
        f"{probe.total:,} images of split {probe.split}, "
        f"{probe.head} head on {probe.pool} features, seed {seed}."
    )
    name, value = "Probe top-1 ↑", f"{probe.top1:.1%} [{low:.1%}, {high:.1%}]"
    yield TableRow(name, value, f"95% interval; {how}", headline=name)
    yield TableRow("Probe top-5 ↑", f"{probe.top5:.1%}", how)
    yield from _transfer_rows(results)

    found = results.separability
    how = (
        f"In feature space, cosine distance, {found.num_images:,} validation images of "
        f"{found.num_classes} classes, {found.num_neighbours} neighbours, each image left out."
    )
    for name, features in (("features", found.contradiff), ("base alone", found.base)):
        silhouette = features.silhouette
        shown = "not defined" if silhouette is None else f"{silhouette:.3f}"
        value = f"kNN {features.knn:.1%}, silhouette {shown}"
        yield TableRow(f"Separability, {name} ↑", value, how)

    trainable, frozen = results.pretrain.parameters.trainable, results.pretrain.parameters.frozen
    total = trainable + frozen
    how = f"{trainable / max(total, 1):.1%} of {total:,} in all; {frozen:,} are frozen."
    name = "Trainable parameters"
    yield TableRow(name, f"{trainable:,}", how, headline=name)
    yield TableRow("Pretraining steps", f"{results.pretrain.num_steps:,}", f"Seed {seed}.")


def _score_rows(score: ScoreRecord) -> Iterator[TableRow]:
    accuracy = score.extractor_accuracy
    known = "" if accuracy is None else f" (its accuracy: {accuracy:.1%})"
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


def _transfer_rows(results: RunResults) -> Iterator[TableRow]:
    transfer = results.transfer
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
                spread = "" if result.std is None else f" ± {result.std:.1%}"
                yield TableRow(
                    f"Transfer top-1, {name}{which} ↑",
                    f"{result.mean:.1%}{spread}",
                    f"{taken}, {transfer.total:,} test images, seed {results.seed}.",
                    "Transfer top-1 ↑" if is_main and name == "ridge" else "",
                )


def render_html(results: RunResults, *, loss: bytes, loss_dark: bytes) -> str:
    """Make the page: one file that holds its images and forbids the browser every request.

    `loss` and `loss_dark` show the losses on a light and on a dark page, as PNGs.
    """
    return _render("report.html", results, loss=loss, loss_dark=loss_dark)


def render_markdown(results: RunResults) -> str:
    """Make the same report for a terminal or a code host; it links build/figures."""
    return _render("report.md", results)


def summarise(results: RunResults, *, report: str) -> str:
    """Make JSON for programs: each result's name, its value with how it was measured, the page."""
    pairs = [
        [row.name, f"{row.value} — {row.detail}" if row.detail else row.value]
        for row in result_rows(results)
    ]
    return json.dumps({"rows": pairs, "report": report}, indent=2, ensure_ascii=False) + "\n"


def _render(template: str, results: RunResults, **figures: bytes) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": lambda text: text.replace("|", "\\|").replace("\n", " "),
        "url": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
    }
    params = results.pretrain.params
    settings = _flatten(params)
    sections = {"general": {key: text for key, text in settings.items() if "." not in key}}
    return environment.get_template(template).render(
        rows=list(result_rows(results)),
        results=results,
        settings=settings,
        sections=sections
        | {name: _flatten(tree) for name, tree in params.items() if isinstance(tree, Mapping)},
        records={
            f"metrics/{stage}.json": _flatten(
                getattr(results, stage).model_dump(exclude_unset=True)
            )
            for stage in ("probe", "transfer", "score", "separability")
        },
        small_samples=int.from_bytes(results.samples[16:20]) < 900,  # a PNG's width
        **figures,
    )


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
