"""Few-shot transfer of frozen features to another data set (Sec. 4.2.3, Table 6)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int64
from pydantic import Field
from torch import Tensor, nn

from contradiff.data.subsets import k_shot_split
from contradiff.evaluation.accuracy import topk_correct
from contradiff.optim import SgdParams


class TransferParams(SgdParams):
    """Few-shot classification of another data set; the SGD settings are of its probe."""

    section: ClassVar[str] = "transfer"

    shots: int = Field(ge=1, description="training images a class")
    num_splits: int = Field(ge=1, description="seeded draws of the training images")
    ridge: float = Field(gt=0, description="penalty of the closed form, not divided by n")


@runtime_checkable
class ProbeTrainer(Protocol):
    """`probing.train_linear_probe` with its settings bound, as by `functools.partial`."""

    def __call__(
        self,
        features: Float[Tensor, "n d"],
        labels: Int64[Tensor, " n"],
        *,
        num_classes: int,
        seed: int,
    ) -> nn.Module:
        """Return a module from features (m, d) to logits (m, num_classes)."""
        ...


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
    labels: Sequence[int], *, shots: int, num_splits: int, seed: int
) -> list[list[int]]:
    """Draw the training samples of each split: split i is `k_shot_split` with seed + i.

    Args:
        labels: Classes of the whole training pool.
        shots: Samples a class.
        num_splits: Number of splits, at least 1.
        seed: Seed of the first.

    Returns:
        For each split, ascending indices into `labels`.

    Raises:
        ValueError: a class has fewer samples than `shots`.
    """
    return [k_shot_split(labels, shots=shots, seed=seed + index) for index in range(num_splits)]


def compact_splits(splits: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Keep of the pool only what some split uses, so that features are computed for no other.

    Returns:
        The used indices into the pool, ascending, and the splits as indices into these.
    """
    used = sorted({index for split in splits for index in split})
    position = {index: row for row, index in enumerate(used)}
    return used, [[position[index] for index in split] for split in splits]


def transfer(
    features_train: Float[Tensor, "n d"],
    labels_train: Int64[Tensor, " n"],
    features_test: Float[Tensor, "m d"],
    labels_test: Int64[Tensor, " m"],
    *,
    splits: Sequence[Sequence[int]],
    num_classes: int,
    ridge: float,
    train_probe: ProbeTrainer,
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
        ridge: Penalty of `ridge_classifier`.
        train_probe: Trains the SGD probe on one split.
        seed: Seed of the first split's probe; split i has seed + i.
    """
    ridge_top1: list[float] = []
    probe_top1: list[float] = []
    for index, split in enumerate(splits):
        rows = torch.tensor(split, device=features_train.device)
        features, labels = features_train[rows], labels_train[rows]
        closed_form = ridge_classifier(features, labels, num_classes=num_classes, ridge=ridge)
        ridge_top1.append(_top1(closed_form(features_test), labels_test))
        probe = train_probe(features, labels, num_classes=num_classes, seed=seed + index).eval()
        with torch.no_grad():
            probe_top1.append(_top1(probe(features_test.float()), labels_test))
    return TransferResult(
        ridge=_summarise(ridge_top1), probe=_summarise(probe_top1), total=len(labels_test)
    )


def _top1(logits: Float[Tensor, "m c"], labels: Int64[Tensor, " m"]) -> float:
    return topk_correct(logits, labels, 1) / len(labels)


def _summarise(top1: list[float]) -> TransferScores:
    std = statistics.stdev(top1) if len(top1) > 1 else None
    return TransferScores(top1=top1, mean=statistics.fmean(top1), std=std)
