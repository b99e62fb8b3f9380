"""Splits, shares and scores of a transfer set, against plain loops."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from contradiff.base.loading import load_vae
from contradiff.data.map_shards import Processes
from contradiff.downstream.probe import train_linear_probes
from contradiff.downstream.transfer import (
    TransferParams,
    TransferScores,
    TransferTask,
    batch_share_of,
    draw_splits,
    ridge_top1,
    score_splits,
    transfer_batches,
    transfer_metrics,
)
from contradiff.features.batches import encode_images
from contradiff.features.models import LabelledFeatures
from contradiff.sources.transfer_set import TransferSplit

PARAMS = {
    "shots": [25],
    "num_splits": 3,
    "ridge": 1.0,
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "batch_size": 64,
    "epochs": 50,
    "warmup_epochs": 5,
    "finetune_epochs": 0,
    "finetune_lr": 0.001,
    "finetune_weight_decay": 0.05,
    "finetune_batch_size": 64,
}


def params_of(**changes: object) -> TransferParams:
    return TransferParams.model_validate(PARAMS | changes)


def labelled(features: Tensor, labels: Tensor) -> LabelledFeatures:
    return LabelledFeatures(features, labels, tuple(map(str, range(len(labels)))))


def samples(num_samples: int, *, dim: int, num_classes: int, seed: int) -> LabelledFeatures:
    """Overlapping clusters, each feature at a scale and offset of its own."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % num_classes
    features = centres[labels] + 1.5 * torch.randn(num_samples, dim, generator=generator)
    scale = torch.logspace(-2, 2, dim)
    return labelled(features * scale - 2 * scale, labels)


def split_of(labels: Sequence[int]) -> TransferSplit:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    keys = tuple(f"image-{row}" for row in range(len(labels)))
    return TransferSplit(np.array(labels), keys, ("a", "b", "c", "d"), lambda rows: images[rows])


@pytest.mark.parametrize(("num_samples", "dim"), [(60, 10), (20, 50)])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_ridge_equals_the_normal_equations(num_samples: int, dim: int, penalty: float):
    train = samples(num_samples, dim=dim, num_classes=4, seed=0)
    test = samples(301, dim=dim, num_classes=4, seed=1)
    mean, std = train.features.double().mean(0), train.features.double().std(0, correction=0)
    x, x_test = ((each.features.double() - mean) / std for each in (train, test))
    y = 2.0 * torch.nn.functional.one_hot(train.labels, 4).double() - 1.0
    gram = x.T @ x + penalty * torch.eye(dim, dtype=torch.float64)
    logits = x_test @ torch.linalg.solve(gram, x.T @ (y - y.mean(0))) + y.mean(0)
    expected = (logits.argmax(1) == test.labels).double().mean().item()
    assert ridge_top1(train, test, ridge=penalty) == pytest.approx(expected, abs=1e-12)


def test_splits_of_several_shots_are_nested():
    labels = [index % 5 for index in range(200)]
    splits = draw_splits(labels, params_of(shots=[25, 1, 5, 10, "full"]), 7)
    assert splits["full"] == [list(range(200))]
    assert draw_splits(labels, params_of(num_splits=2), 8)[25] == splits[25][1:]
    for fewer, more in ((1, 5), (5, 10), (10, 25)):
        for small, large in zip(splits[fewer], splits[more], strict=True):
            assert len(small) == 5 * fewer
            assert set(small) < set(large)
    few = TransferTask(split_of(labels), split_of([0]), {k: splits[k] for k in (25, 1, 5)}, 7)
    # fewer shots ask for no further features: the headline's noise and score stay as they are
    assert few.used == TransferTask(few.pool, few.test, {25: splits[25]}, 7).used
    for shots, group in few.splits.items():
        for index, split in enumerate(group):
            assert [few.used[place] for place in few.places(shots, index)] == split


@given(
    num_rows=st.integers(0, 200),
    batch_size=st.integers(1, 50),
    num_processes=st.integers(1, 9),
)
def test_shares_are_the_whole_in_whole_batches(num_rows: int, batch_size: int, num_processes: int):
    shares = [
        batch_share_of(num_rows, batch_size=batch_size, processes=Processes(rank, num_processes))
        for rank in range(num_processes)
    ]
    assert [row for share in shares for row in share] == list(range(num_rows))
    assert all(share.start % batch_size == 0 for share in shares if share)
    counts = [-(-len(share) // batch_size) for share in shares]
    assert max(counts) - min(counts) <= 1


def test_batches_are_rows_of_the_split(tiny_base: Path):
    split, rows = split_of([number % 3 for number in range(11)]), [10, 0, 3, 4, 5, 6, 9, 1]
    vae, size = load_vae(tiny_base), {"image_size": 32, "device": torch.device("cpu")}
    encode = lambda images, labels: encode_images(vae, images, labels, **size)  # noqa: E731
    batches = list(transfer_batches(encode, split, rows, batch_size=3))
    assert [len(batch.keys) for batch in batches] == [3, 3, 2]
    assert [key for batch in batches for key in batch.keys] == [f"image-{row}" for row in rows]
    # the noise is of the row in the split, whatever other rows are used
    assert [index for batch in batches for index in batch.indices] == rows
    expected = encode(
        torch.from_numpy(split.read(rows[3:6])), torch.from_numpy(split.labels[rows[3:6]])
    )
    assert batches[1].latents.equal(expected.latents)
    assert batches[1].labels.equal(expected.labels)


def test_each_split_is_scored_on_the_whole_test_set():
    pool = samples(400, dim=12, num_classes=4, seed=0)
    test = samples(301, dim=12, num_classes=4, seed=1)
    params = params_of(shots=[10], batch_size=16, epochs=20, warmup_epochs=1.0)
    splits = draw_splits(pool.labels.tolist(), params, 0)
    task = TransferTask(split_of(pool.labels.tolist()), split_of(test.labels.tolist()), splits, 0)
    scores = score_splits(task, pool.only(task.used), test, params=params)[10]
    for index, split in enumerate(splits[10]):
        own = pool.only(split)
        assert scores["ridge"].top1[index] == ridge_top1(own, test, ridge=1.0) > 0.5
        [probe] = train_linear_probes(
            own.features,
            own.labels,
            num_classes=4,
            settings=[params.setting],
            schedule=params.schedule,
            seed=index,
        )
        correct = (probe(test.features).argmax(1) == test.labels).sum().item()
        assert scores["sgd"].top1[index] == correct / 301 > 0.5


def test_metrics_have_the_headline_first():
    several = {"ridge": TransferScores([0.25, 0.5, 0.75]), "sgd": TransferScores([0.5] * 3)}
    one = {"ridge": TransferScores([0.9]), "finetuned": TransferScores([0.7])}
    metrics = transfer_metrics({25: several, "full": one}, total=99, source="digits")
    shown = {
        "ridge": {"mean": 0.5, "std": pytest.approx(statistics.stdev([0.25, 0.5, 0.75]))},
        "sgd": {"mean": 0.5, "std": 0.0},
        "num_splits": 3,
    }
    assert metrics == {
        **shown,
        "shots": 25,
        "total": 99,
        "source": "digits",
        "by_shots": {
            "25": shown,
            "full": {
                "ridge": {"mean": 0.9, "std": None},
                "finetuned": {"mean": 0.7, "std": None},
                "num_splits": 1,
            },
        },
    }


def test_shots_are_counts_or_full():
    for shots in ([25], [25, 1, 5, 10, "full"], ["full"]):
        assert params_of(shots=shots).shots == shots
    for shots in ([0], [], 25, ["all"], [5, 5], [True], [2.0], ["full", "full"]):
        with pytest.raises(ValidationError, match="shots"):
            params_of(shots=shots)
