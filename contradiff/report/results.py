"""What the stages left, read back: the values that a report is made of.

files => `read_results` => `Results`; a gap is refused with the file's name and its stage
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError

# Which stage makes a file, so that a message can say what to run.
_MAKERS = {
    "build/pretrain/config.json": "pretrain",
    "metrics/pretrain.csv": "pretrain",
    "metrics/probe.json": "probe",
    "metrics/separability.json": "separability",
    "build/figures/tsne.png": "separability",
    "build/figures/tsne_dark.png": "separability",
    "metrics/transfer.json": "transfer",
    "build/figures/samples.png": "generate",
    "metrics/score.json": "score",
}
_COLUMNS = ("step", "epoch", "lr", "loss", "reconstruction", "contrastive", "grad_norm")


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


class OfShots(_Record):
    """Classifiers trained on so many images a class."""

    ridge: MeanStd
    sgd: MeanStd
    finetuned: MeanStd | None = None
    num_splits: int = Field(gt=0)


class TransferMetrics(OfShots):
    """metrics/transfer.json: classifiers on the same few-shot splits, and for other shots."""

    shots: int | Literal["full"] = Field(description="training images a class")
    total: int = Field(gt=0, description="test images judged a split")
    source: str
    by_shots: dict[str, OfShots]


class SampleScores(_Record):
    """Scores of the generated images by one resizer."""

    fid: float
    kid: float
    kid_std: float
    precision: float
    recall: float
    density: float
    coverage: float
    inception_score: float
    inception_score_std: float


class ScoreMetrics(SampleScores):
    """metrics/score.json: scores by the first resizer; those by another stand under its name."""

    biased: bool = Field(description="an FID of so few images")
    num_samples: int = Field(gt=0)
    num_reference: int = Field(gt=0)
    num_kept: int = Field(gt=0, description="features a side, for KID, precision and the like")
    extractor: str
    extractor_accuracy: float | None
    condition: str
    guidance: float
    resizer: str
    reference: str
    reference_sha256: str
    seed: int

    @property
    def by_resizer(self) -> dict[str, SampleScores]:
        """The first resizer's scores and the others'."""
        others = {
            name: SampleScores.model_validate(value)
            for name, value in (self.model_extra or {}).items()
            if isinstance(value, dict)
        }
        return {self.resizer: self, **others}


class Separation(_Record):
    """How well classes separate in one feature space."""

    knn: float = Field(ge=0, le=1, description="accuracy of the neighbours' vote")
    silhouette: float | None = Field(ge=-1, le=1, description="none where it is not defined")


class SeparabilityMetrics(_Record):
    """metrics/separability.json: the trained model's features beside its base's own."""

    contradiff: Separation
    base: Separation
    num_images: int = Field(gt=0)
    num_classes: int = Field(gt=0)
    num_neighbours: int = Field(gt=0)


class _ProbeFile(_Record):
    # DVC shows the metrics of all files in one table: each file has its own outer key.
    probe: ProbeMetrics


class _TransferFile(_Record):
    transfer: TransferMetrics


class _ScoreFile(_Record):
    score: ScoreMetrics


class _SeparabilityFile(_Record):
    separability: SeparabilityMetrics


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
    empty; `samples`, `tsne` and `tsne_dark` are PNGs.
    """

    seed: int
    pretrain: PretrainRecord
    probe: ProbeMetrics
    transfer: TransferMetrics
    score: ScoreMetrics
    curve: dict[str, Float[np.ndarray, " rows"]]
    separability: SeparabilityMetrics
    samples: bytes
    tsne: bytes
    tsne_dark: bytes


def read_results(root: Path, *, seed: int) -> Results:
    """Read what the other stages left below `root`, the project's root.

    Raises:
        ValueError: a file is missing, malformed or lacks a key; names the file and the stage that
            makes it.
    """
    curve = _read_curve(root)
    separability = _read_record(root, "metrics/separability.json", _SeparabilityFile).separability
    return Results(
        seed=seed,
        pretrain=_read_record(root, "build/pretrain/config.json", PretrainRecord),
        probe=_read_record(root, "metrics/probe.json", _ProbeFile).probe,
        transfer=_read_record(root, "metrics/transfer.json", _TransferFile).transfer,
        score=_read_record(root, "metrics/score.json", _ScoreFile).score,
        curve=curve,
        separability=separability,
        samples=_read_png(root, "build/figures/samples.png"),
        tsne=_read_png(root, "build/figures/tsne.png"),
        tsne_dark=_read_png(root, "build/figures/tsne_dark.png"),
    )


def _require(root: Path, name: str) -> Path:
    path = root / name
    if not path.is_file():
        raise ValueError(fault(name, "no such file"))
    return path


def _read_png(root: Path, name: str) -> bytes:
    content = _require(root, name).read_bytes()
    if not content.startswith(b"\x89PNG\r\n"):
        raise ValueError(fault(name, "not a PNG"))
    return content


def fault(name: str, what: str) -> str:
    """A message about a file, with the stage that makes it."""
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
        raise ValueError(fault(name, faults)) from None


def _read_curve(root: Path) -> dict[str, Float[np.ndarray, " rows"]]:
    name = "metrics/pretrain.csv"
    with _require(root, name).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    absent = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    if absent:
        raise ValueError(fault(name, f"no column {', '.join(absent)}"))
    try:
        return {
            column: np.array([float(row[column] or "nan") for row in rows], dtype=np.float64)
            for column in _COLUMNS
        }
    except ValueError as error:
        raise ValueError(fault(name, str(error))) from None


def percent(fraction: float) -> str:
    """A share in [0, 1] as text."""
    return f"{100 * fraction:.1f}%"


def lookup(params: Mapping[str, Any], key: str) -> object:
    """A checkpoint's parameter by its dotted key.

    Raises:
        ValueError: there is none.
    """
    value: Any = params
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(fault("build/pretrain/config.json", f"params.{key}: missing"))
        value = value[part]
    return value
