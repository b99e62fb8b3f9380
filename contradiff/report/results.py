"""Reads the files that the stages have written, and checks them."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
IgnoredFiles = dict[str, dict[str, int]]
"""Split => kind of files, such as ".gif" or "hidden" => number of files that were not read."""

PRETRAIN_FILE, IMAGES_FILE = "build/pretrain/config.json", "build/shards/index.json"
CURVES = {
    "loss": "total loss",
    "reconstruction": "reconstruction loss",
    "contrastive": "contrastive loss",
    "grad_norm": "gradient norm",
}
"""The columns of metrics/pretrain.csv that the report draws, with the titles of their panels."""


class _Record(BaseModel):
    """A JSON object of results. The report also keeps and lists keys that are not declared here."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, arbitrary_types_allowed=True)


class AccuracyRecord(_Record):
    """Accuracy of one classifier of one feature."""

    top1: Fraction
    interval: tuple[float, float] | None = Field(None, description="95% interval of top1")
    c: float | None = Field(None, description="C of logistic regression")
    converged: bool | None = None
    width: Count | None = Field(None, description="number of values of a baseline's feature")


class ProbeRecord(_Record):
    """Content of metrics/probe.json."""

    top1: Fraction
    top5: Fraction
    interval: tuple[float, float] = Field(description="95% confidence interval of top1")
    total: Count = Field(description="number of classified images")
    split: str
    head: str
    pool: str
    model: str
    protocol: Literal["logistic", "sgd"]
    logistic: AccuracyRecord | None
    sgd: AccuracyRecord
    table2: dict[str, float | bool]
    few_labels: dict[str, AccuracyRecord]


class BaselinesRecord(_Record):
    """Content of metrics/baselines.json."""

    rows: dict[str, AccuracyRecord]
    protocol: Literal["logistic", "sgd"]
    split: str


class MeanStd(_Record):
    """Mean and standard deviation of an accuracy over random few-shot training sets."""

    mean: Fraction
    std: float | None = Field(ge=0, description="None for one few-shot set")


class ShotsRecord(_Record):
    """Accuracies of classifiers that were trained on the same number of images of each class."""

    logistic: MeanStd | None = None
    ridge: MeanStd
    sgd: MeanStd
    finetuned: MeanStd | None = None
    num_splits: Count

    @property
    def sgd_lags(self) -> bool:
        """Whether SGD is more than one point below logistic regression: it has not converged."""
        return self.logistic is not None and self.sgd.mean < self.logistic.mean - 0.01


class TransferRecord(ShotsRecord):
    """Content of metrics/transfer.json: results for the first number of shots; then `by_shots`."""

    shots: int | Literal["full"] = Field(description="training images of each class")
    total: Count = Field(description="number of test images")
    source: str
    protocol: Literal["logistic", "ridge", "sgd"]
    top1: MeanStd
    by_shots: dict[str, ShotsRecord]
    ignored: IgnoredFiles = Field(default_factory=dict[str, dict[str, int]])


class ResizerScores(_Record):
    """Scores of the generated images with one resizer."""

    fid: float | None = Field(description="None, like all other scores, if `withheld` says why")
    kid: float | None
    kid_std: float | None
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    inception_score: float | None
    inception_score_std: float | None


class ScoreRecord(ResizerScores):
    """Content of metrics/score.json. Scores with another resizer have its name as key."""

    withheld: str | None = Field(description="why there are no scores")
    biased: bool = Field(description="whether a set has fewer than 10,000 images")
    num_samples: Count
    num_reference: Count
    num_kept: Count = Field(description="number of images per set for KID and precision")
    extractor: str
    extractor_accuracy: float | None
    condition: str
    guidance: float
    resizer: str
    reference: str
    reference_sha256: str
    seed: int


class Separation(_Record):
    """How well one feature space separates the classes."""

    knn: Fraction = Field(description="accuracy of a vote of the nearest neighbours")
    silhouette: float | None = Field(ge=-1, le=1, description="None if it is not defined")


class DenoisingError(_Record):
    """Mean squared error of the predicted noise, of the trained model and of its base."""

    contradiff: float = Field(ge=0)
    base: float = Field(ge=0)
    num_images: Count


class Retrieval(_Record):
    """How often h of an image's second view finds h of the first (`downstream.diagnostics`)."""

    own: Fraction
    null: Fraction
    by_latent: Fraction
    by_condition: Fraction


class Diagnostics(_Record):
    """How often h finds another view of an image. Further keys have the spread of features."""

    retrieval: Retrieval
    num_images: Count


class SeparabilityRecord(_Record):
    """Content of metrics/separability.json, for the trained model and its base."""

    contradiff: Separation
    base: Separation
    denoising_error: DenoisingError
    diagnostics: Diagnostics | None = Field(description="None if the dev split is too small")
    num_images: Count
    num_classes: Count
    num_neighbours: Count


class ImagesShard(_Record):
    """A shard of images."""

    num_samples: Count


class ImagesFacts(_Record):
    """Facts about the images."""

    class_ids: list[str]
    num_quarantined: dict[str, int] = Field(description="split => number of unreadable images")
    ignored: IgnoredFiles = Field(default_factory=dict[str, dict[str, int]])


class ImagesRecord(_Record):
    """Content of build/shards/index.json."""

    splits: dict[str, list[ImagesShard]]
    facts: ImagesFacts


class ModelSize(_Record):
    """Numbers of parameters; `modules` has the pair (trainable, frozen) of each module."""

    trainable: int = Field(ge=0)
    frozen: int = Field(ge=0)
    modules: dict[str, tuple[int, int]]


class PretrainRecord(_Record):
    """Content of build/pretrain/config.json."""

    params: dict[str, Any]
    parameters: ModelSize
    num_steps: int = Field(ge=0)


class RunResults(_Record):
    """Everything that the report shows."""

    seed: int
    images: ImagesRecord
    pretrain: PretrainRecord
    probe: ProbeRecord
    baselines: BaselinesRecord
    transfer: TransferRecord
    score: ScoreRecord
    separability: SeparabilityRecord
    curve: dict[str, Float[np.ndarray, " rows"]]  # an empty cell becomes NaN
    training_log: str = Field(description="metrics/pretrain.csv as it is")
    samples: bytes  # this and the next two are PNGs
    tsne: bytes
    tsne_dark: bytes


def read_results(root: Path, *, seed: int) -> RunResults:
    """Read what the other stages wrote below `root`, the project's folder.

    Raises ValueError if a file is missing or malformed. The message names the stage to run.
    """
    files = {"pretrain": PRETRAIN_FILE, "images": IMAGES_FILE}
    content = {name: _read(root, file, _parse_json) for name, file in files.items()}
    for stage in ("probe", "baselines", "transfer", "separability", "score"):
        content |= _read(root, f"metrics/{stage}.json", _parse_json)  # one key: the stage's name
    for name in ("samples", "tsne", "tsne_dark"):
        content[name] = _read(root, f"build/figures/{name}.png", _parse_png)
    content |= {"curve": _read(root, "metrics/pretrain.csv", _parse_curve), "seed": seed}
    content["training_log"] = _read(root, "metrics/pretrain.csv", bytes.decode)
    try:
        return RunResults.model_validate(content)
    except ValidationError as error:
        stage = error.errors()[0]["loc"][0]
        faults = "; ".join(
            f"{'.'.join(map(str, each['loc'][stage in files :]))}: {each['msg']}"
            for each in error.errors()
            if each["loc"][0] == stage
        )
        file = files.get(str(stage), f"metrics/{stage}.json")
        raise ValueError(fault(file, faults)) from None


def fault(file: str, what: str) -> str:
    """Return a message: what is wrong with a file, and which stage makes the file."""
    stem = Path(file).stem.removesuffix("_dark")
    makers = {"config": "pretrain", "index": "shard", "samples": "generate", "tsne": "separability"}
    stage = makers.get(stem, stem)
    return f"{file}: {what}; the stage {stage} makes this file: run `dvc repro {stage}`"


def _read(root: Path, file: str, parse: Callable[[bytes], Any]) -> Any:
    if not (root / file).is_file():
        raise ValueError(fault(file, "no such file"))
    try:
        return parse((root / file).read_bytes())
    except Exception as error:  # such as RecursionError, for JSON of 100,000 brackets
        raise ValueError(fault(file, str(error) or type(error).__name__)) from error


def _parse_json(content: bytes) -> dict[str, Any]:
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _parse_png(content: bytes) -> bytes:
    from PIL import Image

    try:
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()
    except (OSError, SyntaxError):
        raise ValueError("not a PNG") from None
    return content


def _parse_curve(content: bytes) -> dict[str, Float[np.ndarray, " rows"]]:
    lines = content.decode(errors="replace").splitlines()
    if not lines:
        raise ValueError("the file is empty")
    reader = csv.DictReader(lines, restval="(no cell)")
    rows, columns = list(reader), ("step", *CURVES)
    if absent := set(columns) - set(reader.fieldnames or ()):
        raise ValueError(f"missing column {', '.join(sorted(absent))}")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}
