"""Writes the report as HTML, Markdown and JSON. The same inputs give the same bytes."""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from contradiff.report.paper import paper_tables
from contradiff.report.results import (
    PRETRAIN_FILE,
    AccuracyRecord,
    MeanStd,
    ProbeRecord,
    ResizerScores,
    RunResults,
    ScoreRecord,
    fault,
)

if TYPE_CHECKING:
    from jinja2 import Template

CLASSIFIERS = {
    "logistic": "logistic regression",
    "ridge": "ridge regression",
    "sgd": "SGD",
    "finetuned": "fine-tuned",
}
BASELINES = {
    "chance": ("Chance", "Every image gets the same class."),
    "base_pooled": ("Base, means of three maps", "UNet maps at all three timesteps;"),
    "base_cleanest": ("Base, mean of the cleanest map", "UNet map at the lowest timestep;"),
    "base_cleanest_unpooled": ("Base, cleanest map unpooled", "All values of this UNet map;"),
    "untrained_head": ("Untrained attention head", "h before pretraining;"),
}
"""Each row of metrics/baselines.json => its name in the report, and what it was computed from."""


class TableRow(NamedTuple):
    """A row of the table of results; `detail` says how the value was measured."""

    name: str
    value: str
    detail: str


def result_rows(results: RunResults) -> Iterator[TableRow]:
    """Yield the rows of the table of results: each score, and how it was measured.

    Raises ValueError if build/pretrain/config.json lacks `loss.lambda` or `lora.rank`.
    """
    settings, seed = _flatten(results.pretrain.params), results.seed
    for key in ("loss.lambda", "lora.rank"):
        if key not in settings:
            raise ValueError(fault(PRETRAIN_FILE, f"params.{key}: missing"))
    yield TableRow("λ", settings["loss.lambda"], "Weight of the contrastive loss")
    yield TableRow("LoRA rank", settings["lora.rank"], "")
    facts, number = results.images.facts, dict[str, int]()
    for split, shards in results.images.splits.items():
        number[split] = sum(shard.num_samples for shard in shards)
    shown = ", ".join(f"{count:,} {split}" for split, count in number.items())
    unreadable = {split: {"unreadable": n} for split, n in facts.num_quarantined.items() if n}
    left_out = f"{_left_out(facts.ignored)}{_left_out(unreadable)}"
    yield TableRow("Images", shown, f"{len(facts.class_ids):,} classes.{left_out}")
    yield from _score_rows(results.score)
    error = results.separability.denoising_error
    how = f"MSE of predicted noise, null condition, {error.num_images:,} validation images"
    how += f" at ten noise levels; the base alone has {error.base:.4f}."
    yield TableRow("Denoising error ↓", f"{error.contradiff:.4f}", how)
    probe, transfer = results.probe, results.transfer
    how = (
        f"{CLASSIFIERS[probe.protocol]}, {probe.total:,} images of split {probe.split}, "
        f"{probe.head} head on {probe.pool} features, seed {seed}."
    )
    untrained = [
        f"{BASELINES[name][0].lower()} {row.top1:.1%}"
        for name, row in results.baselines.rows.items()
        if name in {"base_pooled", "untrained_head"}
    ]
    without = f" Without pretraining: {', '.join(untrained)}." if untrained else ""
    yield TableRow("Probe top-1 ↑", _accuracy(probe), f"95% interval; {how}{without}")
    yield TableRow("Probe top-5 ↑", f"{probe.top5:.1%}", how)
    taken = f"{CLASSIFIERS[transfer.protocol]}; {_shots(results, str(transfer.shots))}"
    taken += _left_out(transfer.ignored)
    yield TableRow("Transfer top-1 ↑", _spread(transfer.top1), taken)
    found = results.separability
    how = (
        f"In feature space, cosine distance, {found.num_images:,} validation images of "
        f"{found.num_classes} classes, {found.num_neighbours} neighbours among the other images."
    )
    for name, space in (("features", found.contradiff), ("base alone", found.base)):
        shown = "not defined" if space.silhouette is None else f"{space.silhouette:.3f}"
        yield TableRow(f"Separability, {name} ↑", f"kNN {space.knn:.1%}, silhouette {shown}", how)
    if found.diagnostics is not None:
        rates, number = found.diagnostics.retrieval, found.diagnostics.num_images
        how = (
            f"Top-1 among {number:,} dev images, each view with its image as condition. With null "
            f"conditions {rates.null:.1%}. If views have another image as condition, "
            f"{rates.by_latent:.1%} find their own image, {rates.by_condition:.1%} the other one."
        )
        yield TableRow("Image found by h in another view", f"{rates.own:.1%}", how)
    trainable, frozen = results.pretrain.parameters.trainable, results.pretrain.parameters.frozen
    total = trainable + frozen
    how = f"{trainable / max(total, 1):.1%} of {total:,} in all; {frozen:,} are frozen."
    yield TableRow("Trainable parameters", f"{trainable:,}", how)
    yield TableRow("Pretraining steps", f"{results.pretrain.num_steps:,}", f"Seed {seed}.")


def _left_out(files: Mapping[str, Mapping[str, int]]) -> str:
    """Say which files were not read, as a sentence after another one; "" if there are none."""
    kinds = [f"{n:,} {kind} ({split})" for split, by in files.items() for kind, n in by.items()]
    return f" Left out: {', '.join(kinds)}." if kinds else ""


def _score_rows(score: ScoreRecord) -> Iterator[TableRow]:
    accuracy = score.extractor_accuracy
    known = "" if accuracy is None else f" (its accuracy: {accuracy:.1%})"
    compared = (
        f"{score.num_samples:,} samples ({score.condition}; guidance {score.guidance:g}) against "
        f"{score.num_reference:,} reference images ({score.reference}; "
        f"{score.reference_sha256[:8]}), extractor {score.extractor}{known}, seed {score.seed}"
    )
    mark = " (biased)" if score.biased else ""
    if score.biased:
        compared = f"Fewer than 10,000 images bias the FID upwards; the KID has no bias. {compared}"
    kept = f"On {score.num_kept:,} images of each set; otherwise measured as the FID above."
    classes = f"{score.num_samples:,} samples, no reference, classes of {score.extractor}"
    if score.withheld is not None:
        compared, mark = f"No score: {score.withheld}. {compared}", ""
        kept = "No score, for the same reason."
        classes = f"{kept} {classes}"
    extra = (score.model_extra or {}).items()
    others = {key: ResizerScores(**item) for key, item in extra if isinstance(item, Mapping)}
    for resizer, scores in {score.resizer: score, **others}.items():
        which = "" if scores is score else f", {resizer}"
        how = f"{compared}, resizer {resizer}."
        yield TableRow(f"FID{which} ↓", _numbers("", ".2f", scores.fid) + mark, how)
        yield TableRow(f"KID{which} ↓", _numbers(" ± ", ".4f", scores.kid, scores.kid_std), kept)
        pair = _numbers(", ", ".3f", scores.precision, scores.recall)
        yield TableRow(f"Precision, recall{which} ↑", pair, kept)
        pair = _numbers(", ", ".3f", scores.density, scores.coverage)
        yield TableRow(f"Density, coverage{which} ↑", pair, kept)
        value = _numbers(" ± ", ".2f", scores.inception_score, scores.inception_score_std)
        how = f"{classes}, resizer {resizer}, seed {score.seed}."
        yield TableRow(f"Inception score{which} ↑", value, how)


def _numbers(between: str, form: str, *values: float | None) -> str:
    """Return numbers as text. A dash stands for scores that may not be given."""
    given = [format(value, form) for value in values if value is not None]
    return between.join(given) if len(given) == len(values) else "–"


def feature_rows(results: RunResults) -> Iterator[TableRow]:
    """Yield the rows of the table of features: top-1 accuracies of all classifiers.

    The features of the stage `baselines` come first. They need no pretraining.
    """
    probe, baselines = results.probe, results.baselines
    for name, (title, how) in BASELINES.items():
        if row := baselines.rows.get(name):
            width = "" if row.width is None else f" {row.width:,} values; "
            trained = f"{width}{_classifier(baselines.protocol, row)}." if width else ""
            yield TableRow(title, _accuracy(row), f"{how}{trained}")
    is_h = (probe.model, probe.pool) == ("contradiff", "attention")
    feature = "h" if is_h else f"{probe.model}, {probe.pool}"
    if probe.head == "attentive":
        feature = "head trained with labels"
    if probe.logistic is not None:
        c, limit = probe.logistic.c, "" if probe.logistic.converged else " Not converged."
        how = f"C = {c:g}, chosen on held-out training images.{limit}"
        yield TableRow(f"{feature}, logistic regression", _accuracy(probe.logistic), how)
    how = "The setting of params.yaml."
    if probe.sgd.converged is False:
        how += " Not converged: more than one point below logistic regression."
    yield TableRow(f"{feature}, SGD", _accuracy(probe.sgd), how)
    top1 = probe.table2.get("top1")
    how = "Learning rate and weight decay of the paper's Table 2"
    how += ", and its epochs and batch size." if probe.table2.get("literal") else "."
    value = "diverged" if top1 is None else f"{top1:.1%}"
    yield TableRow(f"{feature}, SGD as in the paper's Table 2", value, how)
    for share, row in sorted(probe.few_labels.items(), key=lambda item: float(item[0])):
        title = f"{feature}, {100 * float(share):g}% of the labels"
        how = f"{_classifier('logistic', row)}; the same share of each class."
        yield TableRow(title, _accuracy(row), how)
    for shots, record in results.transfer.by_shots.items():
        for name, classifier in CLASSIFIERS.items():
            if (result := getattr(record, name)) is not None:
                images = "all images" if shots == "full" else f"{shots} shots"
                title = f"Transfer, {images}, {classifier}"
                how = _shots(results, shots)
                if name == "sgd" and record.sgd_lags:
                    how += " Not converged: more than one point below logistic regression."
                yield TableRow(title, _spread(result), how)


def _accuracy(row: AccuracyRecord | ProbeRecord) -> str:
    if row.interval is None:
        return f"{row.top1:.1%}"
    low, high = row.interval
    return f"{row.top1:.1%} [{low:.1%}, {high:.1%}]"


def _classifier(protocol: str, row: AccuracyRecord) -> str:
    known = "" if row.c is None else f", C = {row.c:g}"
    return CLASSIFIERS[protocol] + known + (" (not converged)" if row.converged is False else "")


def _spread(result: MeanStd) -> str:
    return f"{result.mean:.1%}" + ("" if result.std is None else f" ± {result.std:.1%}")


def _shots(results: RunResults, shots: str) -> str:
    """Say how one number of shots was measured."""
    transfer, number = results.transfer, results.transfer.by_shots[shots].num_splits
    over = f"Mean ± standard deviation over {number} random sets" if number > 1 else "One set"
    taken = f"{over} of {transfer.source}, {shots} images a class"
    if shots == "full":
        taken = f"Trained on all training images of {transfer.source}"
    return f"{taken}, {transfer.total:,} test images, seed {results.seed}."


def summarise(results: RunResults, *, report: str) -> str:
    """Return JSON for programs: name, value and detail of each result, and the path `report`."""
    rows = [*result_rows(results), *feature_rows(results)]
    pairs = [[row.name, " — ".join(filter(None, (row.value, row.detail)))] for row in rows]
    return json.dumps({"rows": pairs, "report": report}, indent=2, ensure_ascii=False) + "\n"


def render(template: str, results: RunResults, **figures: bytes) -> str:
    """Return the report as text, from the template "report.html" or "report.md".

    The HTML page contains all its images, so it needs the figures `loss` and `loss_dark` (PNGs).
    In the Markdown text, images are links to the PNG files in build/figures.
    """
    stages = ("probe", "baselines", "transfer", "score", "separability")
    records = ((stage, getattr(results, stage).model_dump(exclude_unset=True)) for stage in stages)
    settings = _flatten(results.pretrain.params)
    sections: dict[str, dict[str, str]] = {"general": {}}
    for key, text in settings.items():
        section, _, name = key.partition(".") if "." in key else ("general", "", key)
        sections.setdefault(section, {})[name] = text
    return load_template(template).render(
        rows=list(result_rows(results)),
        features=list(feature_rows(results)),
        papers=list(paper_tables(results)),
        results=results,
        settings=settings,
        sections=sections,
        records={f"metrics/{stage}.json": _flatten(record) for stage, record in records},
        small_samples=int.from_bytes(results.samples[16:20]) < 900,  # width of the PNG
        **figures,
    )


def load_template(template: str) -> "Template":
    """Load a template. In HTML, all texts are escaped; a name that is not given is an error."""
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
    environment.filters["url"] = _url
    return environment.get_template(template)


def _flatten(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, prefix=f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: object) -> str:
    """Return a value as params.yaml shows it, except that a list is on one line."""
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
