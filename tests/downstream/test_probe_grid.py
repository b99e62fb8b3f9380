"""Which probes are trained on which features and images, and the table of the grid."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.data.subsets import is_dev
from contradiff.downstream.probe import ProbeParams, evaluate
from contradiff.downstream.probe_grid import GridHead, train_grid, write_grid
from contradiff.features.cache import CacheIndex, FeatureCache
from contradiff.features.params import FeatureSpec
from contradiff.features.write_cache import write_table
from tests.clusters import clusters, train_one
from tests.settings import TINY

PARAMS = TINY["probe"] | {"split": "val", "head": "linear", "lr": 0.1, "weight_decay": 0.0}
PARAMS |= {"lrs": [0.3, 0.1], "weight_decays": [0.001], "momentum": 0.9}
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


def test_a_headline_that_diverges_is_refused(cache: FeatureCache):
    fault = r"^probe\.lr: the probe diverges with 1e\+30; set a lower rate"
    with pytest.raises(ValueError, match=fault):
        grid_of(cache, lr=1e30, weight_decay=0.9)


def test_dev_that_holds_out_nothing_is_refused(tmp_path: Path):
    features, labels = clusters(3, dim=7)
    splits = {"train": {"c": features, "labels": labels}}
    cache = cache_of(tmp_path, splits, (FeatureSpec("c", None, None, "mean"),))
    with pytest.raises(ValueError, match=r"^probe\.split: dev holds out 0 of 3"):
        grid_of(cache, split="dev")
