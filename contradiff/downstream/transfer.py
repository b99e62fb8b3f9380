"""Few-shot transfer of features to another data set (Sec. 4.2.3, Table 6).

draw few training images (a "few-shot set", or split) => features => train classifiers => test
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from contradiff.data.map_shards import Processes, Tick
from contradiff.data.subsets import k_shot_split
from contradiff.downstream.finetuning import EncodedImages, finetune, finetuned_top1, weights_kept
from contradiff.downstream.logistic import logistic_score, stratified_folds
from contradiff.downstream.params import Shots, TransferParams
from contradiff.downstream.probe import OnEpoch, evaluate, train_probes
from contradiff.features.batches import CleanBatch
from contradiff.features.models import FeatureModel, LabelledFeatures, compute_features
from contradiff.features.params import FeaturesParams
from contradiff.imports import slow_import
from contradiff.method.model import ContraDiffModel
from contradiff.sources.transfer_set import TransferSplit
from contradiff.types import ByteImages


@dataclass(frozen=True)
class FewShots:
    """A few-shot set. `rows` are ascending indices of images in the pool (all training images)."""

    shots: Shots
    seed: int
    rows: list[int]


@dataclass(frozen=True)
class TransferTask:
    """One transfer experiment: classifiers are trained on few-shot sets and tested on `test`.

    `pool` has all training images, from which the few-shot sets (`splits`) are drawn. `encode`
    turns square images and their labels into a batch for the feature model. In `features`, the
    lists more_triples and more_blocks must be empty.
    """

    pool: TransferSplit
    test: TransferSplit
    encode: Callable[[ByteImages, Int64[Tensor, " n"]], CleanBatch]
    params: TransferParams
    features: FeaturesParams
    seed: int
    processes: Processes

    @cached_property
    def splits(self) -> list[FewShots]:
        """Few-shot sets for each number of shots. Set i is drawn with the seed `seed + i`.

        Of two sets with the same seed, the larger set contains the smaller one. "full" gives one
        set with all images of the pool. Raises ValueError if a class has too few images.
        """
        labels, drawn = self.pool.labels.tolist(), list[FewShots]()
        for n in self.params.shots:
            if n == "full":
                drawn.append(FewShots(n, self.seed, list(range(len(labels)))))
                continue
            seeds = range(self.seed, self.seed + self.params.num_splits)
            drawn += [FewShots(n, s, k_shot_split(labels, shots=n, seed=s)) for s in seeds]
        return drawn

    @cached_property
    def used(self) -> list[int]:
        """Rows of the pool in any few-shot set, ascending. Only these rows need features."""
        return sorted({row for split in self.splits for row in split.rows})

    def places(self, split: FewShots) -> Int64[Tensor, " rows"]:
        """Return the positions of a few-shot set's rows in the list `used`."""
        return torch.from_numpy(np.searchsorted(self.used, split.rows))

    def batches(self, images: TransferSplit, rows: Sequence[int]) -> Iterator[CleanBatch]:
        """Yield batches of the given rows of `images`. An image's row number seeds its noise."""
        for start in range(0, len(rows), self.features.batch_size):
            own = rows[start : start + self.features.batch_size]
            pixels, labels = images.read(own), images.labels[list(own)]
            batch = self.encode(torch.from_numpy(pixels), torch.from_numpy(labels))
            yield replace(batch, indices=tuple(own), keys=tuple(images.keys[row] for row in own))

    def compute_features(
        self, model: FeatureModel, images: TransferSplit, rows: Sequence[int], on_progress: Tick
    ) -> LabelledFeatures:
        """Compute features of the given rows, in order. Every process returns all features.

        Each process computes some of the batches. The features do not depend on the number of
        processes. After each batch of this process, `on_progress` gets the batch's size.
        """
        from accelerate.utils import gather_object

        size, processes = self.features.batch_size, self.processes
        starts = np.array_split(range(0, len(rows), size), processes.size)[processes.rank]
        found: list[LabelledFeatures] = []
        if len(starts):
            batches = self.batches(images, rows[starts[0] : starts[-1] + size])
            found = [compute_features(model, batches, on_progress=on_progress)]
        return LabelledFeatures.joined(gather_object(found))

    def score(
        self, train: LabelledFeatures, test: LabelledFeatures, log: Callable[[str], None]
    ) -> list[dict[str, float]]:
        """Train the classifiers on each few-shot set; return their accuracies by name.

        The names are "logistic" (unless transfer.cs is empty), "ridge" and "sgd". The accuracies
        are top-1, in [0, 1], on all test images. For logistic regression, C is chosen by
        cross-validation within a few-shot set. `train` has the features of the rows in `used`, in
        the same order. `log` gets a message if a logistic regression does not converge.
        """
        scores: list[dict[str, float]] = []
        num_classes, params = len(self.pool.class_names), self.params
        options: dict[str, Any] = {"num_classes": num_classes, "device": torch.device("cpu")}
        options |= {"settings": [params.setting], "schedule": params.schedule}
        for split in self.splits:
            own, top1 = train[self.places(split)], dict[str, float]()
            if params.cs:
                found = logistic_score(
                    (own.features, own.labels),
                    (test.features, test.labels),
                    num_classes=num_classes,
                    cs=params.cs,
                    folds=stratified_folds(own.labels, seed=split.seed),
                )
                found.check(log, self.params.section)
                top1["logistic"] = found.accuracy.top1
            top1["ridge"] = ridge_top1(own, test, ridge=params.ridge)
            [probe] = train_probes(own.features, own.labels, seed=split.seed, **options)
            top1["sgd"] = evaluate(probe, test.features, test.labels).top1
            scores.append(top1)
        return scores

    def finetune(
        self, model: ContraDiffModel, device: torch.device, on_epoch: OnEpoch
    ) -> list[float]:
        """Fine-tune the model on each few-shot set, and return the top-1 accuracy for each set.

        Each training starts from the given weights, which are restored afterwards. The processes
        share the few-shot sets. Raises ValueError if a loss is not finite.
        """
        from accelerate.utils import gather_object

        train = EncodedImages.of(self.batches(self.pool, self.used))
        test = EncodedImages.of(self.batches(self.test, range(len(self.test.labels))))
        own = {k.removeprefix("finetune_"): v for k, v in self.params if k.startswith("finetune_")}
        own |= {"num_classes": len(self.pool.class_names), "on_epoch": on_epoch}
        shared: dict[str, Any] = {"features": self.features, "device": device}
        done: list[tuple[int, float]] = []
        for number in range(self.processes.rank, len(self.splits), self.processes.size):
            split = self.splits[number]
            with weights_kept(model):
                images = train[self.places(split)]
                classifier = finetune(model, images, seed=split.seed, **own, **shared)
                top1 = finetuned_top1(model, classifier, test, seed=self.seed, **shared)
            done.append((number, top1))
        return [top1 for _, top1 in sorted(gather_object(done))]

    def describe(self, scores: Sequence[Mapping[str, float]]) -> dict[str, list[dict[str, Any]]]:
        """Return the content of build/transfer/splits.json: few-shot sets and their accuracies."""
        shown: dict[str, list[dict[str, Any]]] = {}
        for split, top1 in zip(self.splits, scores, strict=True):
            keys = [self.pool.keys[row] for row in split.rows]
            row = {"seed": split.seed, "indices": split.rows, "keys": keys, "top1": dict(top1)}
            shown.setdefault(str(split.shots), []).append(row)
        return shown


def ridge_top1(train: LabelledFeatures, test: LabelledFeatures, *, ridge: float) -> float:
    """Return the test accuracy of ridge regression. Targets are 1 for the label, otherwise -1.

    Each feature is first scaled to mean 0 and variance 1 over the training samples. `ridge` is
    λ in the loss ‖XW − Y‖² + λ‖W‖². The bias is not penalised.
    """
    with slow_import():
        from sklearn.linear_model import RidgeClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), RidgeClassifier(alpha=ridge))
    classifier.fit(train.features.double().numpy(), train.labels.numpy())
    return float(classifier.score(test.features.double().numpy(), test.labels.numpy()))


def transfer_metrics(
    splits: Sequence[FewShots], scores: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Return each classifier's mean top-1 accuracy and standard deviation, by number of shots.

    For n few-shot sets, the deviation has n - 1 in the denominator. It is None if n is 1.
    """
    by_shots: dict[str, dict[str, Any]] = {}
    for shots in dict.fromkeys(split.shots for split in splits):
        own = [top1 for split, top1 in zip(splits, scores, strict=True) if split.shots == shots]
        by_shots[str(shots)] = {"num_splits": len(own)}
        for name in own[0]:
            top1 = [each[name] for each in own]
            std = statistics.stdev(top1) if len(top1) > 1 else None
            by_shots[str(shots)][name] = {"mean": statistics.fmean(top1), "std": std}
    return by_shots
