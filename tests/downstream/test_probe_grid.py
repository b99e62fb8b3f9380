"""What is trained on what, and its table."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from contradiff.downstream.probe_data import ProbeData
from contradiff.downstream.probe_grid import grid_rows, judge_columns
from contradiff.downstream.probe_training import train_linear_probes
from contradiff.downstream.probing import ProbeParams, evaluate
from contradiff.features.cache import CacheIndex, Column, FeatureCache, write_rows

PARAMS = {
    "split": "val",
    "head": "linear",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "lrs": [0.3, 0.1],
    "weight_decays": [0.001],
    "batch_size": 32,
    "epochs": 3,
    "warmup_epochs": 1.0,
}


def draw(num_samples: int, *, seed: int = 0, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_samples,), generator=generator)
    centres = torch.randn(4, width, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(num_samples, width, generator=generator)
    return (centres[labels] + noise) * torch.logspace(-2, 2, width), labels


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    columns = (
        Column("attention:mid@4-2-1", (4, 2, 1), "mid", "attention"),
        Column("mean:up.1@4-2-1", (4, 2, 1), "up.1", "mean"),
    )
    shards = {}
    for split, number in (("train", 120), ("val", 40)):
        features, labels = draw(number, seed=len(split))
        tensors = {
            columns[0].name: features.half(),
            columns[1].name: torch.cat([features, -features], dim=1).half(),
            "labels": labels,
        }
        path = tmp_path / f"{split}-00000.safetensors"
        shards[split] = (write_rows(path, tensors, keys=[f"{split}{i}" for i in range(number)]),)
    CacheIndex("base", "0" * 8, "fp16", 4, columns, None, shards, {}, {}).write(tmp_path)
    return FeatureCache.open(tmp_path, fingerprint_of=lambda _: None)


def judged(cache: FeatureCache, *, dev: bool):
    return judge_columns(
        ProbeData(cache, dev=dev),
        params=ProbeParams.model_validate(PARAMS),
        seed=0,
        device=torch.device("cpu"),
        on_progress=lambda *_: None,
    )


def test_the_grid_names_the_headline_and_table_2(cache: FeatureCache):
    grid = judged(cache, dev=False)
    rows = grid_rows(grid)
    assert [row["name"] for row in rows] == ["configured", "table2", *[""] * 8]
    assert [row["block"] for row in rows] == ["mid"] * 5 + ["up.1"] * 5
    assert (rows[1]["lr"], rows[1]["momentum"], rows[1]["weight_decay"]) == (0.01, 0.9, 0.05)
    assert {row["total"] for row in rows} == {40}
    train, val = ProbeData(cache, dev=False).column("attention:mid@4-2-1")
    [alone] = train_linear_probes(
        train,
        cache.labels("train"),
        num_classes=4,
        settings=[grid[0].setting],
        schedule=ProbeParams.model_validate(PARAMS).schedule,
        seed=0,
    )
    assert grid[0].result == evaluate(alone, val, cache.labels("val"))


def test_dev_holds_out_training_images_and_never_reads_val(cache: FeatureCache, tmp_path: Path):
    (tmp_path / "val-00000.safetensors").unlink()
    data = ProbeData(cache, dev=True)
    train, dev = data.labels()
    assert len(train) + len(dev) == 120
    assert 0 < len(dev) < 40
    assert {head.result.total for head in judged(cache, dev=True) if head.result} == {len(dev)}


def test_dev_that_holds_out_nothing_is_refused(tmp_path: Path):
    features, labels = draw(3)
    tensors = {"c": features, "labels": labels}
    keys = ["a", "b", "c"]
    shard = write_rows(tmp_path / "train-00000.safetensors", tensors, keys=keys)
    columns = (Column("c", None, None, "mean"),)
    CacheIndex("timm", "0" * 8, "fp16", 4, columns, None, {"train": (shard,)}, {}, {}).write(
        tmp_path
    )
    cache = FeatureCache.open(tmp_path, fingerprint_of=lambda _: None)
    with pytest.raises(ValueError, match=r"^probe\.split: dev holds out 0 of 3"):
        ProbeData(cache, dev=True)
