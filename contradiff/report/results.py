"""The stages' files, read back and checked."""

import csv
import io
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]

PRETRAIN_FILE = "build/pretrain/config.json"
CURVES = {
    "loss": "total loss",
    "reconstruction": "reconstruction loss",
    "contrastive": "contrastive loss",
    "grad_norm": "gradient norm",
}
"""Columns of metrics/pretrain.csv that the report draws over its column `step`."""

_STAGES = {
    PRETRAIN_FILE: "pretrain",
    "metrics/pretrain.csv": "pretrain",
    "build/figures/tsne.png": "separability",
    "build/figures/tsne_dark.png": "separability",
    "build/figures/samples.png": "generate",
    **{f"metrics/{stage}.json": stage for stage in ("probe", "transfer", "separability", "score")},
}


class _Record(BaseModel):
    """A JSON object of results; the report keeps and lists keys that it does not know."""

    model_config = ConfigDict(
        extra="allow", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class ProbeRecord(_Record):
    """metrics/probe.json."""

    top1: Fraction
    top5: Fraction
    interval: tuple[float, float] = Field(description="95% interval of top1")
    total: Count = Field(description="classified images")
    split: str
    head: str
    pool: str


class MeanStd(_Record):
    """Accuracy over random splits."""

    mean: Fraction
    std: float | None = Field(ge=0, description="None for a single split")


class ShotsRecord(_Record):
    """Classifiers trained on one number of images a class."""

    ridge: MeanStd
    sgd: MeanStd
    finetuned: MeanStd | None = None
    num_splits: Count


class TransferRecord(ShotsRecord):
    """metrics/transfer.json: the main number of shots, and under `by_shots` every number."""

    shots: int | Literal["full"] = Field(description="training images a class")
    total: Count = Field(description="test images a split")
    source: str
    by_shots: dict[str, ShotsRecord]


class ResizerScores(_Record):
    """Scores of the generated images, resized in one way."""

    fid: float
    kid: float
    kid_std: float
    precision: float
    recall: float
    density: float
    coverage: float
    inception_score: float
    inception_score_std: float


class ScoreRecord(ResizerScores):
    """metrics/score.json: scores by the first resizer; the others' stand under their names."""

    biased: bool = Field(description="whether the FID is of fewer than 10,000 images")
    num_samples: Count
    num_reference: Count
    num_kept: Count = Field(description="features a side for KID, precision and the like")
    extractor: str
    extractor_accuracy: float | None
    condition: str
    guidance: float
    resizer: str
    reference: str
    reference_sha256: str
    seed: int


class Separation(_Record):
    """How well the classes separate in one feature space."""

    knn: Fraction = Field(description="accuracy of the nearest neighbours' vote")
    silhouette: float | None = Field(ge=-1, le=1, description="None where it is not defined")


class SeparabilityRecord(_Record):
    """metrics/separability.json: the trained model's features and the base's own."""

    contradiff: Separation
    base: Separation
    num_images: Count
    num_classes: Count
    num_neighbours: Count


class ModelSize(_Record):
    """Numbers of parameters, also [trainable, frozen] of each module."""

    trainable: int = Field(ge=0)
    frozen: int = Field(ge=0)
    modules: dict[str, tuple[int, int]]


class PretrainRecord(_Record):
    """build/pretrain/config.json."""

    params: dict[str, Any]
    parameters: ModelSize
    num_steps: int = Field(ge=0)


class RunResults(_Record):
    """All that the report shows.

    `curve` maps `step` and the keys of `CURVES` to columns of metrics/pretrain.csv, with NaN for
    empty cells; `samples`, `tsne` and `tsne_dark` are PNGs.
    """

    seed: int
    pretrain: PretrainRecord
    probe: ProbeRecord
    transfer: TransferRecord
    score: ScoreRecord
    separability: SeparabilityRecord
    curve: dict[str, Float[np.ndarray, " rows"]]
    samples: bytes
    tsne: bytes
    tsne_dark: bytes


def read_results(root: Path, *, seed: int) -> RunResults:
    """Read what the other stages wrote below `root`, the project's folder.

    Raises:
        ValueError: A file is missing or malformed, or lacks a key. The message names the file and
            the stage that makes it.
    """
    records = {"pretrain": _read_json(root, PRETRAIN_FILE)}
    for stage in ("probe", "transfer", "separability", "score"):
        records |= _read_json(root, f"metrics/{stage}.json")  # each has one outer key: the stage
    figures = {
        name: _read_png(root, f"build/figures/{name}.png")
        for name in ("samples", "tsne", "tsne_dark")
    }
    content = {**records, **figures, "curve": _read_curve(root), "seed": seed}
    try:
        return RunResults.model_validate(content)
    except ValidationError as error:
        stage = error.errors()[0]["loc"][0]
        faults = "; ".join(
            f"{'.'.join(map(str, each['loc'])).removeprefix('pretrain.')}: {each['msg']}"
            for each in error.errors()
            if each["loc"][0] == stage
        )
        file = PRETRAIN_FILE if stage == "pretrain" else f"metrics/{stage}.json"
        raise ValueError(fault(file, faults)) from None


def fault(file: str, what: str) -> str:
    """Say what is wrong with a file, and which stage makes it."""
    stage = _STAGES[file]
    return f"{file}: {what}; the {stage} stage makes it: run `dvc repro {stage}`"


def _read_bytes(root: Path, file: str) -> bytes:
    if not (root / file).is_file():
        raise ValueError(fault(file, "no such file"))
    return (root / file).read_bytes()


def _read_json(root: Path, file: str) -> dict[str, Any]:
    content = _read_bytes(root, file)
    try:
        record = json.loads(content)
    except ValueError as error:
        raise ValueError(fault(file, str(error))) from None
    if not isinstance(record, dict):
        raise ValueError(fault(file, "not a JSON object"))
    return record


def _read_png(root: Path, file: str) -> bytes:
    from PIL import Image

    content = _read_bytes(root, file)
    try:
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()
    except (OSError, SyntaxError):
        raise ValueError(fault(file, "not a PNG")) from None
    return content


def _read_curve(root: Path) -> dict[str, Float[np.ndarray, " rows"]]:
    file = "metrics/pretrain.csv"
    lines = _read_bytes(root, file).decode(errors="replace").splitlines()
    reader = csv.DictReader(lines, restval="(no cell)")
    rows, columns = list(reader), ("step", *CURVES)
    if absent := set(columns) - set(reader.fieldnames or ()):
        raise ValueError(fault(file, f"no column {', '.join(sorted(absent))}"))
    try:
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}
    except ValueError as error:
        raise ValueError(fault(file, str(error))) from None
