"""Splits and scores of a transfer set, and how processes share them, must equal plain loops."""

import statistics
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from contradiff.data.map_shards import Processes
from contradiff.data.transforms import Crop
from contradiff.downstream import transfer
from contradiff.downstream.logistic import logistic_score, stratified_folds
from contradiff.downstream.params import TransferParams
from contradiff.downstream.transfer import FewShots, TransferTask, ridge_top1
from contradiff.features.batches import CleanBatch, resized_batch
from contradiff.features.models import LabelledFeatures
from contradiff.features.params import FeatureSpec
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.sources.transfer_set import TransferSplit
from contradiff.types import to_pixels
from tests.clusters import clusters, train_one
from tests.settings import TINY, features_params


def params_of(**changes: object) -> TransferParams:
    return TransferParams.model_validate(TINY["transfer"] | changes)


def samples(num_samples: int, *, dim: int, seed: int) -> LabelledFeatures:
    features, labels = clusters(num_samples, dim=dim, spread=1.5, seed=seed)
    return LabelledFeatures(features, labels, tuple(map(str, range(num_samples))))


def split_of(labels: Sequence[int]) -> TransferSplit:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    keys = tuple(f"image-{row}" for row in range(len(labels)))
    return TransferSplit(np.array(labels), keys, ("a", "b", "c", "d"), lambda rows: images[rows])


def task_of(
    labels: Sequence[int], *, processes: Processes | None = None, **changes: object
) -> TransferTask:
    """Build a task whose "encoder" keeps the images as they are, in batches of three."""
    encode = partial(resized_batch, crop=Crop(0, 0, 32, 32, mirrored=False), size=32)
    features, processes = features_params(batch_size=3), processes or Processes()
    params = params_of(**changes)
    return TransferTask(split_of(labels), split_of([0]), encode, params, features, 7, processes)


@pytest.mark.parametrize(("num_samples", "dim"), [(60, 10), (20, 50)])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_ridge_equals_the_normal_equations(num_samples: int, dim: int, penalty: float):
    train = samples(num_samples, dim=dim, seed=0)
    test = samples(301, dim=dim, seed=1)
    mean, std = train.features.double().mean(0), train.features.double().std(0, correction=0)
    x, x_test = ((each.features.double() - mean) / std for each in (train, test))
    y = 2.0 * torch.nn.functional.one_hot(train.labels, 4).double() - 1.0
    gram = x.T @ x + penalty * torch.eye(dim, dtype=torch.float64)
    logits = x_test @ torch.linalg.solve(gram, x.T @ (y - y.mean(0))) + y.mean(0)
    expected = (logits.argmax(1) == test.labels).double().mean().item()
    assert ridge_top1(train, test, ridge=penalty) == pytest.approx(expected, abs=1e-12)


def test_splits_of_several_shots_are_nested():
    labels = [index % 5 for index in range(200)]
    shots = [25, 1, 5, 10, "full"]
    splits = task_of(labels, shots=shots).splits
    assert [(split.shots, split.seed) for split in splits] == [
        *((number, seed) for number in shots[:-1] for seed in (7, 8, 9)),
        ("full", 7),
    ]
    rows = {(split.shots, split.seed): split.rows for split in splits}
    assert rows["full", 7] == list(range(200))
    for fewer, more in ((1, 5), (5, 10), (10, 25)):
        for seed in (7, 8, 9):
            assert len(rows[fewer, seed]) == 5 * fewer
            assert set(rows[fewer, seed]) < set(rows[more, seed])
    # entries with fewer shots need no more features, so the headline's score does not change
    few = task_of(labels, shots=[25, 1, 5])
    assert few.used == task_of(labels, shots=[25]).used
    for split in few.splits:
        assert [few.used[place] for place in few.places(split)] == split.rows


class MeanColour(TimmFeatures):
    """A fake feature model that records the indices of the images it gets."""

    def __init__(self) -> None:
        self.columns = (FeatureSpec("mean", None, None, "mean"),)
        self.shown: list[tuple[int, ...]] = []

    def __call__(self, batch: CleanBatch) -> dict[str, Tensor]:
        self.shown.append(batch.indices)
        return {"mean": batch.pixels.mean(dim=(2, 3))}


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_processes_share_whole_batches(num_processes: int):
    rows = [10, 0, 3, 4, 5, 6, 9, 1]
    found, shown = [], []
    for rank in range(min(num_processes, 3)):  # a lone process needs a batch
        model = MeanColour()
        task = task_of([n % 3 for n in range(11)], processes=Processes(rank, num_processes))
        found.append(task.compute_features(model, task.pool, rows, lambda _: None))
        shown += model.shown
    assert shown == [(10, 0, 3), (4, 5, 6), (9, 1)]  # rows of the data set, which seed the noise
    whole = LabelledFeatures.joined(found)
    assert whole.keys == tuple(f"image-{row}" for row in rows)
    assert whole.labels.tolist() == [row % 3 for row in rows]
    pixels = to_pixels(torch.from_numpy(task.pool.read(rows)))
    torch.testing.assert_close(whole.features, pixels.mean(dim=(2, 3)))


def test_each_split_is_scored_on_the_whole_test_set():
    pool, test = samples(400, dim=12, seed=0), samples(301, dim=12, seed=1)
    sgd = {"lr": 0.01, "batch_size": 16, "epochs": 20, "warmup_epochs": 1.0}
    task = task_of(pool.labels.tolist(), shots=[10], **sgd)
    scores = task.score(pool[torch.tensor(task.used)], test, pytest.fail)
    for split, score in zip(task.splits, scores, strict=True):
        own = pool[torch.tensor(split.rows)]
        assert score["ridge"] == ridge_top1(own, test, ridge=1.0) > 0.5
        settings = {"setting": task.params.setting, "schedule": task.params.schedule}
        probe = train_one(own.features, own.labels, seed=split.seed, **settings)
        correct = (probe(test.features).argmax(1) == test.labels).sum().item()
        assert score["sgd"] == correct / 301 > 0.5
        rows = split.rows
        peer = logistic_score(
            (pool.features[rows], pool.labels[rows]),
            (test.features, test.labels),
            num_classes=4,
            cs=task.params.cs,
            folds=stratified_folds(pool.labels[rows], seed=split.seed),
        )
        assert score["logistic"] == peer.accuracy.top1 > 0.5
    # it can be switched off, and changes nothing of the others
    off = task_of(pool.labels.tolist(), shots=[10], cs=[], headline="ridge", **sgd)
    others = [{kind: score[kind] for kind in ("ridge", "sgd")} for score in scores]
    assert off.score(pool[torch.tensor(off.used)], test, pytest.fail) == others
    with pytest.raises(ValidationError, match=r"transfer\.headline: logistic needs values of C"):
        params_of(cs=[])


def test_metrics_are_means_and_deviations_over_splits():
    splits = [*(FewShots(25, seed, []) for seed in range(3)), FewShots("full", 0, [])]
    scores = [{"ridge": top1, "sgd": 0.5} for top1 in (0.25, 0.5, 0.75)]
    scores.append({"ridge": 0.9, "finetuned": 0.7})
    deviation = pytest.approx(statistics.stdev([0.25, 0.5, 0.75]))
    few = {"ridge": {"mean": 0.5, "std": deviation}, "sgd": {"mean": 0.5, "std": 0.0}}
    full = {"ridge": {"mean": 0.9, "std": None}, "finetuned": {"mean": 0.7, "std": None}}
    expected = {"25": few | {"num_splits": 3}, "full": full | {"num_splits": 1}}
    assert transfer.transfer_metrics(splits, scores) == expected


def test_shots_are_counts_or_full():
    for shots in ([25], [25, 1, 5, 10, "full"], ["full"]):
        assert params_of(shots=shots).shots == shots
    for shots in ([0], [], 25, ["all"], [5, 5], [True], [2.0], ["full", "full"]):
        with pytest.raises(ValidationError, match="shots"):
            params_of(shots=shots)
