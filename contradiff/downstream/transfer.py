"""Few-shot transfer of features to another data set (Sec. 4.2.3, Table 6)."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float, Float64, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.data.subsets import k_shot_split
from contradiff.downstream.accuracy import topk_correct
from contradiff.downstream.probe_training import train_linear_probes
from contradiff.training.optim import SgdParams

Shots: TypeAlias = int | Literal["full"]
"""Training images a class, or all that there are."""


class TransferParams(SgdParams):
    """Few-shot classification of another data set; the SGD settings are of its probe."""

    section: ClassVar[str] = "transfer"

    shots: list[Shots] = Field(
        min_length=1, description="training images a class, or full; the first is the headline"
    )
    num_splits: int = Field(ge=1, description="seeded draws of the training images; of full one")
    ridge: float = Field(gt=0, description="penalty of the closed form, not divided by n")
    finetune_epochs: int = Field(
        ge=0, description="of LoRA, attention head and a linear classifier; 0: none (paper)"
    )
    finetune_lr: float = Field(gt=0, description="AdamW's peak learning rate")
    finetune_weight_decay: float = Field(ge=0)
    finetune_batch_size: int = Field(ge=1)

    @model_validator(mode="after")
    def _shots_are_counts(self) -> "TransferParams":
        counts = [shots for shots in self.shots if shots != "full"]
        if len(set(self.shots)) < len(self.shots) or any(count < 1 for count in counts):
            raise ValueError(
                f"transfer.shots: distinct numbers of 1 or more, or full; not {self.shots}"
            )
        return self


@dataclass(frozen=True)
class LinearClassifier:
    """Logits x·W + b, in float64."""

    weight: Float64[Tensor, "d c"]
    bias: Float64[Tensor, " c"]

    def __call__(self, features: Float[Tensor, "n d"]) -> Float64[Tensor, "n c"]:
        """Logits of raw features."""
        return features.double() @ self.weight + self.bias


@dataclass(frozen=True)
class TransferScores:
    """Top-1 accuracy, in [0, 1], of one classifier.

    Attributes:
        top1: One for each split.
        mean: Their mean.
        std: Their deviation with n - 1 in the denominator; None with a single split.
    """

    top1: list[float]
    mean: float
    std: float | None


@dataclass(frozen=True)
class TransferResult:
    """Scores of both classifiers on `total` test samples."""

    ridge: TransferScores
    probe: TransferScores
    total: int


def solve_primal(
    inputs: Float64[Tensor, "n d"], targets: Float64[Tensor, "n c"], *, ridge: float
) -> Float64[Tensor, "d c"]:
    """(XᵀX + λI)⁻¹ XᵀY, a system of d equations."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(inputs.T @ targets, torch.linalg.cholesky(gram))


def solve_dual(
    inputs: Float64[Tensor, "n d"], targets: Float64[Tensor, "n c"], *, ridge: float
) -> Float64[Tensor, "d c"]:
    """Xᵀ (XXᵀ + λI)⁻¹ Y, the same solution by n equations."""
    kernel = inputs @ inputs.T
    kernel.diagonal().add_(ridge)
    return inputs.T @ torch.cholesky_solve(targets, torch.linalg.cholesky(kernel))


def ridge_classifier(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    ridge: float,
) -> LinearClassifier:
    """One-against-rest ridge regression on ±1 targets, in closed form.

    Each feature is brought to mean 0 and variance 1 over the training samples; one that does not
    vary counts for nothing. Decorrelating them too would make the penalty a mere scale of the
    logits. The bias is not penalised.

    Args:
        features: Training features; no statistics come from elsewhere.
        labels: Classes in [0, num_classes); some may be absent.
        num_classes: Number of classes.
        ridge: Penalty λ > 0 in ‖XW − Y‖² + λ‖W‖², as scikit-learn's `alpha`.

    Returns:
        The classifier of raw features: the scaling is folded into it.
    """
    raw = features.double()
    mean, scale = raw.mean(0), raw.std(0, correction=0)
    # Rounding leaves a constant column a deviation of some 1e-16 of its value.
    is_constant = scale <= 1e-12 * mean.abs()
    inverse_scale = torch.where(is_constant, 0.0, 1.0 / scale)
    inputs = (raw - mean) * inverse_scale
    targets = 2.0 * nn.functional.one_hot(labels, num_classes).double() - 1.0
    offset = targets.mean(0)
    solve = solve_dual if len(inputs) < inputs.shape[1] else solve_primal
    weight = inverse_scale[:, None] * solve(inputs, targets - offset, ridge=ridge)
    return LinearClassifier(weight=weight, bias=offset - mean @ weight)


def draw_splits(
    labels: Sequence[int], *, shots: Shots, num_splits: int, seed: int
) -> list[list[int]]:
    """Draw the training samples of each split: split i is `k_shot_split` with seed + i.

    Splits are nested: of one seed, fewer shots are a part of more.

    Args:
        labels: Classes of the whole training pool.
        shots: Samples a class; "full" is the whole pool, of which there is one split.
        num_splits: Number of splits, at least 1.
        seed: Seed of the first.

    Returns:
        For each split, ascending indices into `labels`.

    Raises:
        ValueError: a class has fewer samples than `shots`.
    """
    if shots == "full":
        return [list(range(len(labels)))]
    return [k_shot_split(labels, shots=shots, seed=seed + index) for index in range(num_splits)]


def compact_splits(
    splits: Mapping[Shots, Sequence[Sequence[int]]],
) -> tuple[list[int], dict[Shots, list[list[int]]]]:
    """Keep of the pool only what some split uses, so that features are computed for no other.

    Returns:
        The used indices into the pool, ascending, and the splits as indices into these.
    """
    used = sorted({index for group in splits.values() for split in group for index in split})
    position = {index: row for row, index in enumerate(used)}
    rows: dict[Shots, list[list[int]]] = {
        shots: [[position[index] for index in split] for split in group]
        for shots, group in splits.items()
    }
    return used, rows


def transfer(
    features_train: Float[Tensor, "n d"],
    labels_train: Int64[Tensor, " n"],
    features_test: Float[Tensor, "m d"],
    labels_test: Int64[Tensor, " m"],
    *,
    splits: Sequence[Sequence[int]],
    num_classes: int,
    params: TransferParams,
    seed: int,
) -> TransferResult:
    """Train both classifiers on each split and test each on the whole test set.

    Args:
        features_train: Frozen features of the training pool, or of what `compact_splits` kept.
        labels_train: Their classes.
        features_test: Frozen features of the test set, all of them.
        labels_test: Their classes.
        splits: Rows of `features_train` for each split.
        num_classes: Number of classes.
        params: Penalty of `ridge_classifier`, and the SGD probe's settings.
        seed: Seed of the first split's probe; split i has seed + i.
    """
    ridge_top1: list[float] = []
    probe_top1: list[float] = []
    for index, split in enumerate(splits):
        rows = torch.tensor(split, device=features_train.device)
        features, labels = features_train[rows], labels_train[rows]
        closed_form = ridge_classifier(
            features, labels, num_classes=num_classes, ridge=params.ridge
        )
        ridge_top1.append(_top1(closed_form(features_test), labels_test))
        [probe] = train_linear_probes(
            features,
            labels,
            num_classes=num_classes,
            settings=[params.setting],
            schedule=params.schedule,
            seed=seed + index,
        )
        with torch.no_grad():
            probe_top1.append(_top1(probe(features_test.float()), labels_test))
    return TransferResult(
        ridge=summarise(ridge_top1), probe=summarise(probe_top1), total=len(labels_test)
    )


def summarise(top1_of_splits: list[float]) -> TransferScores:
    """Mean and deviation over splits."""
    std = statistics.stdev(top1_of_splits) if len(top1_of_splits) > 1 else None
    return TransferScores(top1=top1_of_splits, mean=statistics.fmean(top1_of_splits), std=std)


def transfer_metrics(
    scores: Mapping[Shots, Mapping[str, TransferScores]], *, total: int, source: str
) -> dict[str, Any]:
    """What metrics/transfer.json holds under `transfer`.

    Args:
        scores: for each number of shots, the headline's first, each classifier's scores.
        total: test samples that each split is judged on.
        source: name of the data set.

    Returns:
        The headline's classifiers at the top, and every number of shots below `by_shots`.
    """
    by_shots: dict[Shots, dict[str, Any]] = {
        shots: {name: {"mean": kind.mean, "std": kind.std} for name, kind in kinds.items()}
        | {"num_splits": len(next(iter(kinds.values())).top1)}
        for shots, kinds in scores.items()
    }
    headline = next(iter(by_shots))
    named = {str(shots): content for shots, content in by_shots.items()}
    facts = {"shots": headline, "total": total, "source": source, "by_shots": named}
    return by_shots[headline] | facts


def _top1(logits: Float[Tensor, "m c"], labels: Int64[Tensor, " m"]) -> float:
    return topk_correct(logits, labels, 1) / len(labels)
