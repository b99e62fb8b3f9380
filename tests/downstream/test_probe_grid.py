"""Which probes are trained on which features and images, and the table of the grid."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contradiff.data.subsets import is_dev, share_of_each_class
from contradiff.downstream.logistic import LogisticScore, logistic_score, stratified_folds
from contradiff.downstream.params import ProbeParams
from contradiff.downstream.probe import evaluate
from contradiff.downstream.probe_grid import (
    GridHead,
    ProbeData,
    score_columns,
    train_grid,
    write_grid,
)
from contradiff.features.cache import CacheIndex, FeatureCache
from contradiff.features.params import FeatureSpec
from contradiff.features.write_cache import write_table
from tests.clusters import clusters, train_one
from tests.settings import TINY

PARAMS = TINY["probe"] | {"split": "val", "head": "linear", "lr": 0.1, "weight_decay": 0.0}
PARAMS |= {"lrs": [0.3, 0.1], "weight_decays": [0.001], "momentum": 0.9}
CS, NAME = [0.01, 0.1, 1.0], "attention:mid@4-2-1"
PARAMS |= {"batch_size": 32, "epochs": 3, "warmup_epochs": 1.0}


def cache_of(
    folder: Path, splits: dict[str, dict[str, Tensor]], columns: tuple[FeatureSpec, ...]
) -> FeatureCache:
    shards = {}
    for split, tensors in splits.items():
        keys = [f"{split}{number}" for number in range(len(tensors["labels"]))]
        shards[split] = (write_table(folder / f"{split}-00000.safetensors", tensors, keys=keys),)
    facts = {"model": "timm", "checkpoint": "0" * 8, "dtype": "fp16", "num_classes": 4}
    stored = {"columns": columns, "head": None, "shards": shards, "maps": {}, "made_with": {}}
    return FeatureCache(folder, CacheIndex(**facts, **stored))


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    columns = (
        FeatureSpec("attention:mid@4-2-1", (4, 2, 1), "mid", "attention"),
        FeatureSpec("mean:up.1@4-2-1", (4, 2, 1), "up.1", "mean"),
    )
    splits = {}
    for split, number in (("train", 120), ("val", 40)):
        features, labels = clusters(number, dim=7, seed=len(split))
        splits[split] = {
            columns[0].name: features.half(),
            columns[1].name: torch.cat([features, -features], dim=1).half(),
            "labels": labels,
        }
    return cache_of(tmp_path, splits, columns)


def grid_of(cache: FeatureCache, **changes: object) -> list[GridHead]:
    params = ProbeParams.model_validate(PARAMS | changes)
    return train_grid(cache, params=params, seed=0, device=torch.device("cpu"))


def train_alone(features: Tensor, labels: Tensor) -> Any:
    """Train the configured probe without a grid."""
    params = ProbeParams.model_validate(PARAMS)
    return train_one(features, labels, setting=params.setting, schedule=params.schedule)


def test_the_grid_names_the_headline_and_table_2(cache: FeatureCache, tmp_path: Path):
    params = ProbeParams.model_validate(PARAMS)
    grid = grid_of(cache)
    grid[-1] = replace(grid[-1], accuracy=None)  # as if it had diverged
    write_grid(tmp_path / "grid.csv", grid, params=params, index=cache.index)
    rows = list(csv.DictReader((tmp_path / "grid.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["configured", "table2", *[""] * 8]
    assert [row["block"] for row in rows] == ["mid"] * 5 + ["up.1"] * 5
    assert (rows[1]["lr"], rows[1]["momentum"], rows[1]["weight_decay"]) == ("0.01", "0.9", "0.05")
    assert [row["total"] for row in rows] == ["40"] * 9 + [""]
    train, val = (cache.column(split, "attention:mid@4-2-1") for split in ("train", "val"))
    alone = train_alone(train, cache.labels("train"))
    assert grid[0].accuracy == evaluate(alone, val, cache.labels("val"))


def test_dev_holds_out_training_images_and_never_reads_val(cache: FeatureCache, tmp_path: Path):
    (tmp_path / "val-00000.safetensors").unlink()
    held_out = [is_dev(key) for key in cache.keys("train")]
    assert 0 < sum(held_out) < 40
    grid = grid_of(cache, split="dev")
    assert {head.accuracy.total for head in grid if head.accuracy} == {sum(held_out)}
    rest, name = ~torch.tensor(held_out), cache.index.columns[0].name
    alone = train_alone(cache.column("train", name)[rest], cache.labels("train")[rest])
    assert grid[0].probe.linear.weight.allclose(alone.linear.weight)


def chosen(cache: FeatureCache, split: str) -> tuple[LogisticScore, LogisticScore]:
    """Return logistic regression with all labels, and with a fifth of them."""
    data, name = ProbeData(cache, split, seed=0), cache.index.columns[0].name
    return data.logistic(name, CS), data.few_labels(name, 0.2, CS)


def test_c_is_chosen_on_the_dev_split_for_val(cache: FeatureCache):
    train, val = ((cache.column(s, NAME), cache.labels(s)) for s in ("train", "val"))
    dev = np.array([is_dev(key) for key in cache.keys("train")])
    fold = (np.flatnonzero(~dev), np.flatnonzero(dev))
    every, few = chosen(cache, "val")
    assert every == logistic_score(train, val, num_classes=4, cs=CS, folds=[fold])
    rows = share_of_each_class(train[1].tolist(), share=0.2, seed=0)
    train = train[0][rows], train[1][rows]
    folds = stratified_folds(train[1], seed=0)
    assert few == logistic_score(train, val, num_classes=4, cs=CS, folds=folds)


@pytest.mark.parametrize("split", ["val", "dev"])
def test_labels_that_test_choose_nothing(cache: FeatureCache, tmp_path: Path, split: str):
    """With wrong labels of the tested images, C and the classifier's predictions are the same."""
    before = chosen(cache, split)
    labels, wrong = {s: cache.labels(s) for s in ("train", "val")}, {}
    for name, own in labels.items():
        is_dev_image = torch.tensor([is_dev(key) for key in cache.keys(name)])
        tested = torch.ones_like(is_dev_image) if name == "val" else is_dev_image & (split == "dev")
        wrong[name] = torch.where(tested, (own + 1) % 4, own)
    splits = {
        name: {each.name: cache.column(name, each.name) for each in cache.index.columns}
        | {"labels": wrong[name]}
        for name in labels
    }
    (tmp_path / "wrong").mkdir()
    after = chosen(cache_of(tmp_path / "wrong", splits, cache.index.columns), split)
    assert [score.c for score in after] == [score.c for score in before]
    for first, second in zip(before, after, strict=True):
        assert first.accuracy.top1 + second.accuracy.top1 <= 1
        assert first.accuracy.top1 > 0.5


def test_baselines_are_tested_by_logistic_regression_or_by_the_configured_sgd(cache: FeatureCache):
    params = ProbeParams.model_validate(PARAMS)
    options = {"seed": 0, "device": torch.device("cpu"), "on_column": lambda _: None}
    found = score_columns(cache, params=params, **options)
    data = ProbeData(cache, "val", seed=0)
    for pool, name, width in (("attention", NAME, 7), ("mean", cache.index.columns[1].name, 14)):
        assert found[pool] == data.logistic(name, params.cs).metrics() | {"width": width}
    off = {"headline": "sgd", "cs": [], "few_labels": []}
    found = score_columns(cache, params=ProbeParams.model_validate(PARAMS | off), **options)
    grid = [head for head in grid_of(cache, lrs=[], weight_decays=[]) if head.setting.lr == 0.1]
    scores = [head.accuracy.metrics() for head in grid if head.accuracy]
    assert [{k: v for k, v in row.items() if k != "width"} for row in found.values()] == scores


def test_a_headline_that_diverges_is_refused(cache: FeatureCache):
    fault = r"^probe\.lr: the probe diverges with 1e\+30; set a lower rate"
    with pytest.raises(ValueError, match=fault):
        grid_of(cache, lr=1e30, weight_decay=0.9)


def test_dev_that_holds_out_nothing_is_refused(tmp_path: Path):
    features, labels = clusters(3, dim=7)
    splits = {split: {"c": features, "labels": labels} for split in ("train", "val")}
    cache = cache_of(tmp_path, splits, (FeatureSpec("c", None, None, "mean"),))
    with pytest.raises(ValueError, match=r"^probe\.split: dev holds out 0 of 3"):
        grid_of(cache, split="dev")
    with pytest.raises(ValueError, match=r"^probe\.cs: C is chosen on the dev split, which holds"):
        chosen(cache, "val")
