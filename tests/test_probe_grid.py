"""contradiff.probe_grid: heads trained together are the heads trained alone."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from contradiff.feature_cache import CacheIndex, Column, FeatureCache, Rows, write_rows
from contradiff.probe_data import ProbeData
from contradiff.probe_grid import grid_rows, judge_columns, train_linear_probes
from contradiff.probing import (
    TABLE_2,
    ProbeParams,
    SgdSetting,
    evaluate,
    train_attentive_probes,
    train_linear_probe,
)

SETTINGS = [
    SgdSetting(lr=0.1, momentum=0.9, weight_decay=0.0),
    TABLE_2,
    SgdSetting(lr=0.03, momentum=0.5, weight_decay=0.001),
]
SHARED = {"num_classes": 4, "batch_size": 16, "epochs": 6, "warmup_epochs": 1.0, "seed": 3}
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


def test_each_head_is_the_one_trained_alone():
    features, labels = draw(83)  # batches of unequal size
    reports: list[float] = []
    probes = train_linear_probes(
        features,
        labels,
        settings=SETTINGS,
        on_progress=lambda _, row: reports.append(row["loss"]),
        **SHARED,
    )
    test_features, test_labels = draw(200, seed=1)
    for probe, setting in zip(probes, SETTINGS, strict=True):
        alone_reports: list[float] = []
        alone = train_linear_probe(
            features,
            labels,
            on_progress=lambda _, row, to=alone_reports: to.append(row["loss"]),
            **asdict(setting),
            **SHARED,
        )
        assert not probe.training
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(probe.state_dict()[name], value, atol=2e-6, rtol=2e-4)
        expected = evaluate(alone, test_features, test_labels)
        assert evaluate(probe, test_features, test_labels) == expected
        if setting is SETTINGS[0]:
            assert reports == pytest.approx(alone_reports, rel=1e-5)
    weights = [probe.linear.weight for probe in probes]
    assert (weights[0] - weights[1]).abs().max() > 0.1


def test_a_head_that_diverges_leaves_the_others_alone():
    features, labels = draw(60)
    settings = [SETTINGS[0], SgdSetting(lr=1e30, momentum=0.9, weight_decay=0.9)]
    fine, diverged = train_linear_probes(features, labels, settings=settings, **SHARED)
    assert not diverged.linear.weight.isfinite().all()
    [alone] = train_linear_probes(features, labels, settings=settings[:1], **SHARED)
    torch.testing.assert_close(fine.linear.weight, alone.linear.weight)


def test_half_precision_features_are_trained_on_in_single():
    features, labels = draw(60)
    rounded = features.half()
    [half] = train_linear_probes(rounded, labels, settings=SETTINGS[:1], **SHARED)
    [single] = train_linear_probes(rounded.float(), labels, settings=SETTINGS[:1], **SHARED)
    assert torch.equal(half.linear.weight, single.linear.weight)


def test_single_samples_are_refused():
    features, labels = draw(5)
    with pytest.raises(ValueError, match="raise batch_size"):
        train_linear_probes(features, labels, settings=SETTINGS, **SHARED | {"batch_size": 2})


def test_attentive_heads_are_those_trained_alone_and_maps_may_lie_in_parts():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 2 * 4, 5)

        def forward(self, maps: Tensor) -> Tensor:
            return self.linear(maps.flatten(1)).tanh()

    torch.manual_seed(0)
    head = Head()
    features, labels = draw(50, width=24)
    maps = (features / features.std(dim=0)).view(50, 3, 2, 2, 2).half()
    probes = train_attentive_probes(
        Rows([maps[:20], maps[20:]]), labels, attention_head=head, settings=SETTINGS, **SHARED
    )
    for probe, setting in zip(probes, SETTINGS, strict=True):
        [alone] = train_attentive_probes(
            maps, labels, attention_head=head, settings=[setting], **SHARED
        )
        for name, value in alone.state_dict().items():
            assert torch.equal(probe.state_dict()[name], value)


def test_grid_of_params_has_the_configured_setting_first_and_none_twice():
    params = ProbeParams.model_validate(PARAMS)
    assert params.grid == (
        SgdSetting(0.1, 0.9, 0.0),
        TABLE_2,
        SgdSetting(0.1, 0.9, 0.001),
        SgdSetting(0.3, 0.9, 0.0),
        SgdSetting(0.3, 0.9, 0.001),
    )
    attentive = ProbeParams.model_validate(PARAMS | {"head": "attentive"})
    assert attentive.grid == (SgdSetting(0.1, 0.9, 0.0), TABLE_2)
    literal = PARAMS | {"lr": 0.01, "weight_decay": 0.05, "lrs": [], "weight_decays": []}
    assert ProbeParams.model_validate(literal).grid == (TABLE_2,)
    assert not params.is_table_2
    own = {"batch_size": 256, "epochs": 50, "warmup_epochs": 5}
    assert ProbeParams.model_validate(PARAMS | own).is_table_2
    for key, value in (("lrs", [0.0]), ("weight_decays", [-0.1])):
        with pytest.raises(ValueError, match=rf"probe\.{key}"):
            ProbeParams.model_validate(PARAMS | {key: value})


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
    settings = {name: PARAMS[name] for name in ("batch_size", "epochs", "warmup_epochs")}
    alone = train_linear_probe(
        train, cache.labels("train"), num_classes=4, seed=0, **settings, **asdict(grid[0].setting)
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
