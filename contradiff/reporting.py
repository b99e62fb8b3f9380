"""The report: every number of a run with the way it was measured, on one self-contained page.

Along the data's way: `read_results` (files => values) => `result_rows` (values => table),
`embed_features`, `plot_losses`, `plot_embedding` (values => figures) => `render_html`,
`render_markdown`. Nothing here trains, downloads or imports torch, and the same inputs give the
same report: it holds no date and no host name.
"""

# scikit-learn, matplotlib and safetensors are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MIN_UNBIASED_SAMPLES = 10_000
MAX_EMBEDDED_IMAGES = 1_000
MAX_EMBEDDED_CLASSES = 20
NUM_NEIGHBOURS = 10

# Which stage makes a file, so that a message can say what to run.
_MAKERS = {
    "build/pretrain/config.json": "pretrain",
    "metrics/pretrain.csv": "pretrain",
    "metrics/probe.json": "probe",
    "build/probe/features_val.safetensors": "probe",
    "metrics/transfer.json": "transfer",
    "build/figures/samples.png": "generate",
    "metrics/score.json": "score",
}
_COLUMNS = ("step", "epoch", "lr", "loss", "reconstruction", "contrastive", "grad_norm")
_PANELS = {
    "loss": "total loss",
    "reconstruction": "reconstruction loss",
    "contrastive": "contrastive loss",
    "grad_norm": "gradient norm",
}


class _Record(BaseModel):
    """A file of metrics; keys that the report does not know are kept and listed."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


_R = TypeVar("_R", bound=_Record)


class ProbeMetrics(_Record):
    """metrics/probe.json: accuracies in [0, 1], and the 95% interval of top-1."""

    top1: float = Field(ge=0, le=1)
    top5: float = Field(ge=0, le=1)
    interval: tuple[float, float]
    total: int = Field(gt=0, description="images judged")
    split: str
    head: str
    pool: str


class MeanStd(_Record):
    """Mean and standard deviation of an accuracy in [0, 1] over random splits."""

    mean: float = Field(ge=0, le=1)
    std: float | None = Field(ge=0, description="none of a single split")


class TransferMetrics(_Record):
    """metrics/transfer.json: two classifiers on the same few-shot splits."""

    ridge: MeanStd
    sgd: MeanStd
    num_splits: int = Field(gt=0)
    shots: int = Field(gt=0, description="training images a class")
    total: int = Field(gt=0, description="test images judged a split")
    source: str


class ScoreMetrics(_Record):
    """metrics/score.json: scores of the generated images."""

    fid: float
    inception_score: float
    inception_score_std: float
    kid: float | None = None
    kid_std: float | None = None
    num_samples: int = Field(gt=0)
    num_reference: int = Field(gt=0)
    extractor: str
    extractor_accuracy: float | None
    condition: str
    guidance: float
    resizer: str
    reference: str
    seed: int


class _ProbeFile(_Record):
    # DVC shows the metrics of all files in one table: each file has its own outer key.
    probe: ProbeMetrics


class _TransferFile(_Record):
    transfer: TransferMetrics


class _ScoreFile(_Record):
    score: ScoreMetrics


class ParameterCounts(_Record):
    """Sizes of the model: scalars, and [trainable, frozen] for each module."""

    trainable: int = Field(ge=0)
    frozen: int = Field(ge=0)
    modules: dict[str, tuple[int, int]]


class PretrainRecord(_Record):
    """build/pretrain/config.json, as far as the report reads it."""

    params: dict[str, Any]
    parameters: ParameterCounts
    num_steps: int = Field(ge=0)


@dataclass(frozen=True)
class Results:
    """All that the report shows.

    `curve` maps each column of metrics/pretrain.csv to (rows,) float64, NaN where the file is
    empty; `samples` is a PNG.
    """

    seed: int
    pretrain: PretrainRecord
    probe: ProbeMetrics
    transfer: TransferMetrics
    score: ScoreMetrics
    curve: dict[str, Float[np.ndarray, " rows"]]
    features: Float[np.ndarray, "images width"]
    labels: Int[np.ndarray, " images"]
    samples: bytes


@dataclass(frozen=True)
class Row:
    """One line of the table of results; a row with a `headline` also stands at the page's top."""

    name: str
    value: str
    detail: str
    headline: str = ""


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
            f"{self.num_neighbours}-nearest-neighbour accuracy {_percent(self.knn_accuracy)} "
            f"(leave one out; chance {_percent(1 / self.num_classes)}), silhouette {silhouette}. "
            "Distances between groups mean little in a t-SNE."
        )


def read_results(root: Path, *, seed: int) -> Results:
    """Read what the other stages left below `root`, the project's root.

    Raises:
        ValueError: a file is missing, malformed or lacks a key; names the file and the stage that
            makes it.
    """
    curve = _read_curve(root)
    features, labels = _read_features(root)
    return Results(
        seed=seed,
        pretrain=_read_record(root, "build/pretrain/config.json", PretrainRecord),
        probe=_read_record(root, "metrics/probe.json", _ProbeFile).probe,
        transfer=_read_record(root, "metrics/transfer.json", _TransferFile).transfer,
        score=_read_record(root, "metrics/score.json", _ScoreFile).score,
        curve=curve,
        features=features,
        labels=labels,
        samples=_require(root, "build/figures/samples.png").read_bytes(),
    )


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
        else f" (its accuracy: {_percent(score.extractor_accuracy)})"
    )
    compared = (
        f"{score.num_samples:,} samples ({score.condition}; guidance {score.guidance:g}) against "
        f"{score.num_reference:,} reference images "
        f"({score.reference}), extractor {score.extractor}{accuracy}, resizer {score.resizer}, "
        f"seed {score.seed}."
    )
    rows = [
        Row("λ", _plain(_lookup(pretrain.params, "loss.lambda")), "Weight of the contrastive loss"),
        Row("LoRA rank", _plain(_lookup(pretrain.params, "lora.rank")), ""),
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
            f"{_percent(probe.top1)} [{_percent(low)}, {_percent(high)}]",
            f"95% interval; {judged}, {setting}",
            "Probe top-1 ↑",
        ),
        Row("Probe top-5 ↑", _percent(probe.top5), f"{judged}, {setting}"),
    ]
    transfer = results.transfer
    few_shot = (
        f"Mean ± standard deviation over {transfer.num_splits} splits of {transfer.source}, "
        f"{transfer.shots} images a class, {transfer.total:,} test images, seed {seed}."
    )
    for name, result in (("ridge", transfer.ridge), ("SGD", transfer.sgd)):
        spread = "" if result.std is None else f" ± {_percent(result.std)}"
        rows.append(
            Row(
                f"Transfer top-1, {name} ↑",
                f"{_percent(result.mean)}{spread}",
                few_shot,
                "Transfer top-1 ↑" if name == "ridge" else "",
            )
        )
    total = counts.trainable + counts.frozen
    rows += [
        Row(
            "Trainable parameters",
            f"{counts.trainable:,}",
            f"{_percent(counts.trainable / max(total, 1))} of {total:,} in all; "
            f"{counts.frozen:,} are frozen.",
            "Trainable parameters",
        ),
        Row("Pretraining steps", f"{pretrain.num_steps:,}", f"Seed {seed}."),
    ]
    return rows


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
        rank=_plain(_lookup(results.pretrain.params, "lora.rank")),
        weight=_plain(_lookup(results.pretrain.params, "loss.lambda")),
        small_samples=_png_width(results.samples) < 900,
    )


def _require(root: Path, name: str) -> Path:
    path = root / name
    if not path.is_file():
        raise ValueError(_fault(name, "no such file"))
    return path


def _fault(name: str, what: str) -> str:
    stage = _MAKERS[name]
    return f"{name}: {what}; the {stage} stage makes it: run `dvc repro {stage}`"


def _read_record(root: Path, name: str, schema: type[_R]) -> _R:
    try:
        return schema.model_validate_json(_require(root, name).read_bytes())
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or '(whole file)'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ValueError(_fault(name, faults)) from None


def _read_curve(root: Path) -> dict[str, Float[np.ndarray, " rows"]]:
    name = "metrics/pretrain.csv"
    with _require(root, name).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    absent = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    if absent:
        raise ValueError(_fault(name, f"no column {', '.join(absent)}"))
    try:
        return {
            column: np.array([float(row[column] or "nan") for row in rows], dtype=np.float64)
            for column in _COLUMNS
        }
    except ValueError as error:
        raise ValueError(_fault(name, str(error))) from None


def _read_features(
    root: Path,
) -> tuple[Float[np.ndarray, "images width"], Int[np.ndarray, " images"]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    name = "build/probe/features_val.safetensors"
    path = _require(root, name)
    try:
        tensors = load_file(path)
        features, labels = tensors["features"], tensors["labels"]
    except (KeyError, SafetensorError) as error:
        raise ValueError(_fault(name, f"cannot be read: {error}")) from None
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        what = f"features {features.shape} and labels {labels.shape} do not fit each other"
        raise ValueError(_fault(name, what))
    return features, labels


def _lookup(params: Mapping[str, Any], key: str) -> object:
    value: Any = params
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(_fault("build/pretrain/config.json", f"params.{key}: missing"))
        value = value[part]
    return value


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


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


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
        raise ValueError(_fault("build/figures/samples.png", "not a PNG")) from None


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
