"""Few-shot transfer of features to another data set (Sec. 4.2.3, Table 6).

splits of the training pool => features of their images => two classifiers for each split => scores
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor

from contradiff.base.loading import load_vae
from contradiff.data.map_shards import Processes
from contradiff.data.subsets import k_shot_split
from contradiff.downstream.finetuning import EncodedImages, finetune, finetuned_top1, weights_kept
from contradiff.downstream.probe import OnEpoch, evaluate, train_linear_probes
from contradiff.features.batches import CleanBatch, encode_images
from contradiff.features.models import FeatureModel, LabelledFeatures, compute_features
from contradiff.features.params import FeaturesParams
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.method.model import ContraDiff
from contradiff.sources.transfer_set import TransferSet, TransferSplit
from contradiff.training.optim import SgdParams
from contradiff.types import ByteImages

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


Encode: TypeAlias = Callable[[ByteImages, Int64[Tensor, " n"]], CleanBatch]
"""Makes a batch of square images in memory and their classes, as the feature model sees them."""


def ridge_top1(train: LabelledFeatures, test: LabelledFeatures, *, ridge: float) -> float:
    """Test accuracy of one-against-rest ridge regression on ±1 targets, in closed form.

    Each feature is brought to mean 0 and variance 1 over the training samples. Decorrelating them
    too would make the penalty a mere scale of the logits. The bias is not penalised.

    Args:
        train: the only samples that statistics are taken of.
        test: samples to classify.
        ridge: penalty λ > 0 in ‖XW − Y‖² + λ‖W‖², not divided by n.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), RidgeClassifier(alpha=ridge))
    classifier.fit(train.features.double().numpy(), train.labels.numpy())
    return float(classifier.score(test.features.double().numpy(), test.labels.numpy()))


@dataclass(frozen=True)
class TransferTask:
    """A data set and the few-shot splits of its training pool.

    Attributes:
        pool: the training images.
        test: the test images, all of which judge each split.
        splits: for each number of shots its splits, each of ascending rows of the pool.
        seed: of the first split; split i has seed + i.
    """

    pool: TransferSplit
    test: TransferSplit
    splits: Mapping[Shots, Sequence[Sequence[int]]]
    seed: int

    @cached_property
    def used(self) -> list[int]:
        """The rows of the pool that some split uses, ascending: no other needs features."""
        return sorted({row for group in self.splits.values() for split in group for row in split})

    def places(self, shots: Shots, index: int) -> list[int]:
        """Where a split's rows stand among the used ones."""
        place = {row: number for number, row in enumerate(self.used)}
        return [place[row] for row in self.splits[shots][index]]

    @classmethod
    def open(
        cls, images: TransferSet, params: TransferParams, *, image_size: int, seed: int
    ) -> "TransferTask":
        """Open the data set and draw the splits.

        Args:
            images: the data set.
            params: shots and number of splits.
            image_size: side to which an ImageFolder's images are brought.
            seed: of the first split.

        Raises:
            ValueError: the data is missing or damaged, or a class has too few images.
        """
        pool, test = (images.split(name, image_size=image_size) for name in ("train", "test"))
        return cls(pool, test, draw_splits(pool.labels.tolist(), params, seed), seed)


def draw_splits(
    labels: Sequence[int], params: TransferParams, seed: int
) -> dict[Shots, list[list[int]]]:
    """Draw the training samples of each split: split i is `k_shot_split` with seed + i.

    Splits are nested: of one seed, fewer shots are a part of more. "full" is one split, the pool.
    """
    return {
        shots: [list(range(len(labels)))]
        if shots == "full"
        else [
            k_shot_split(labels, shots=shots, seed=seed + index)
            for index in range(params.num_splits)
        ]
        for shots in params.shots
    }


def encoder_of(model: FeatureModel, *, base: Path, image_size: int, device: torch.device) -> Encode:
    """What a feature model sees of an image: its latent, or pixels at the backbone's own size."""
    if isinstance(model, TimmFeatures):
        return model.show
    vae = load_vae(base).to(device)  # pyright: ignore[reportArgumentType]
    return partial(encode_images, vae, image_size=image_size, device=device)


def batch_share_of(num_rows: int, *, batch_size: int, processes: Processes) -> range:
    """The rows that this process computes: whole batches, as a single process would form them.

    So a row's feature does not depend on the number of processes, not even in its last bit.

    Args:
        num_rows: of all processes.
        batch_size: rows of a batch; the last one may be smaller.
        processes: which of how many this is; with fewer batches some have nothing to do.
    """
    num_batches = -(-num_rows // batch_size)
    first, last = (
        number * num_batches // processes.size for number in (processes.rank, processes.rank + 1)
    )
    return range(min(first * batch_size, num_rows), min(last * batch_size, num_rows))


def transfer_batches(
    encode: Encode, images: TransferSplit, rows: Sequence[int], *, batch_size: int
) -> Iterator[CleanBatch]:
    """Yield some rows of a split, encoded; images are read a batch at a time.

    Args:
        encode: makes a batch of images.
        images: the split.
        rows: of the split. An image's noise is seeded by its row in the split, so that it does not
            depend on the others.
        batch_size: images at once.
    """
    for start in range(0, len(rows), batch_size):
        chosen = list(rows[start : start + batch_size])
        pixels, labels = images.read(chosen), images.labels[chosen]
        batch = encode(torch.from_numpy(pixels), torch.from_numpy(labels))
        keys = tuple(images.keys[row] for row in chosen)
        yield replace(batch, indices=tuple(chosen), keys=keys)


def features_of_rows(
    model: FeatureModel,
    encode: Encode,
    images: TransferSplit,
    rows: Sequence[int],
    *,
    batch_size: int,
    processes: Processes,
    on_progress: Callable[[int], None],
) -> LabelledFeatures:
    """Features of some rows of a split, in order; each process computes a share and gets all.

    Args:
        model: images => features.
        encode: makes a batch of images.
        images: the split.
        rows: of the split.
        batch_size: images at once.
        processes: which of how many this is.
        on_progress: told the number of images of each of this process's batches.
    """
    from accelerate.utils import gather_object

    share = batch_share_of(len(rows), batch_size=batch_size, processes=processes)
    own = [rows[place] for place in share]
    batches = transfer_batches(encode, images, own, batch_size=batch_size)
    found = [compute_features(model, batches, on_progress=on_progress)] if own else []
    return LabelledFeatures.joined(gather_object(found))


@dataclass(frozen=True)
class TransferScores:
    """Top-1 accuracy, in [0, 1], of one classifier on each split."""

    top1: list[float]

    @property
    def mean(self) -> float:
        """Over the splits."""
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float | None:
        """Deviation with n - 1 in the denominator; None with a single split."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


ScoresOfShots: TypeAlias = dict[Shots, dict[str, TransferScores]]
"""For each number of shots the scores of each classifier, by its name."""


def score_splits(
    task: TransferTask, train: LabelledFeatures, test: LabelledFeatures, *, params: TransferParams
) -> ScoresOfShots:
    """Train two classifiers, "ridge" and "sgd", on each split; test each on the whole test set.

    Args:
        task: the splits; the SGD probe of split i has the split's seed.
        train: frozen features of the task's used rows.
        test: frozen features of the test set, all of them.
        params: penalty of `ridge_top1`, and the SGD probe's settings.
    """
    scores: ScoresOfShots = {}
    for shots, group in task.splits.items():
        ridge: list[float] = []
        sgd: list[float] = []
        for index in range(len(group)):
            own = train.only(task.places(shots, index))
            ridge.append(ridge_top1(own, test, ridge=params.ridge))
            [probe] = train_linear_probes(
                own.features,
                own.labels,
                num_classes=len(task.pool.class_names),
                settings=[params.setting],
                schedule=params.schedule,
                seed=task.seed + index,
            )
            sgd.append(evaluate(probe, test.features, test.labels).top1)
        scores[shots] = {"ridge": TransferScores(ridge), "sgd": TransferScores(sgd)}
    return scores


def finetune_splits(
    task: TransferTask,
    model: ContraDiff,
    encode: Encode,
    *,
    features: FeaturesParams,
    params: TransferParams,
    device: torch.device,
    processes: Processes,
    on_epoch: OnEpoch,
) -> dict[Shots, TransferScores]:
    """Test accuracy of each split's own copy of the model; each process tunes every n-th split.

    Args:
        task: the splits.
        model: trained, in evaluation mode, on `device`; it is left as it is.
        encode: makes a batch of images.
        features: how features are taken.
        params: of the fine-tuning.
        device: where to compute.
        processes: which of how many this is.
        on_epoch: called after each epoch of each of this process's splits.

    Raises:
        ValueError: a loss is not finite; names transfer.finetune_lr.
    """
    from accelerate.utils import gather_object

    train, test = (
        EncodedImages.of(transfer_batches(encode, images, rows, batch_size=features.batch_size))
        for images, rows in ((task.pool, task.used), (task.test, range(len(task.test.labels))))
    )
    jobs: list[tuple[Shots, int]] = [
        (shots, index) for shots, group in task.splits.items() for index in range(len(group))
    ]
    done: list[tuple[Shots, int, float]] = []
    for shots, index in jobs[processes.rank :: processes.size]:
        with weights_kept(model):
            classifier = finetune(
                model,
                train[torch.tensor(task.places(shots, index))],
                num_classes=len(task.pool.class_names),
                features=features,
                epochs=params.finetune_epochs,
                lr=params.finetune_lr,
                weight_decay=params.finetune_weight_decay,
                batch_size=params.finetune_batch_size,
                seed=task.seed + index,
                device=device,
                on_epoch=on_epoch,
            )
            top1 = finetuned_top1(
                model, classifier, test, features=features, seed=task.seed, device=device
            )
        done.append((shots, index, top1))
    found = {(shots, index): top1 for shots, index, top1 in gather_object(done)}
    return {
        shots: TransferScores([found[shots, index] for index in range(len(group))])
        for shots, group in task.splits.items()
    }


def transfer_metrics(scores: ScoresOfShots, *, total: int, source: str) -> dict[str, Any]:
    """What metrics/transfer.json holds under `transfer`.

    Args:
        scores: of the headline's number of shots first.
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
    return by_shots[headline] | {
        "shots": headline,
        "total": total,
        "source": source,
        "by_shots": named,
    }


def describe_splits(task: TransferTask, scores: ScoresOfShots) -> dict[str, list[dict[str, Any]]]:
    """What build/transfer/splits.json holds under `splits`: each split's images and its scores."""
    return {
        str(shots): [
            {
                "seed": task.seed + index,
                "indices": split,
                "keys": [task.pool.keys[row] for row in split],
                "top1": {name: kind.top1[index] for name, kind in scores[shots].items()},
            }
            for index, split in enumerate(group)
        ]
        for shots, group in task.splits.items()
    }
