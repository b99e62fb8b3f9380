"""stages.baselines: rows of features that no training has made, by the protocol of the probe."""

from stages.runtime.run import Run

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from contradiff.config import parse
from contradiff.data.subsets import is_dev
from contradiff.downstream.logistic import logistic_score
from contradiff.features.batches import stored_batches
from contradiff.features.cache import ModelFolders
from contradiff.features.models import compute_features, load_feature_model
from contradiff.features.params import FeaturesParams
from stages import baselines
from tests.settings import TINY


def call(run: Run, params: dict[str, Any], **probing: Any) -> dict[str, Any]:
    content = copy.deepcopy({"seed": 0, **params, "features": TINY["features"]})
    content["probe"] = TINY["probe"] | {"epochs": 2, "warmup_epochs": 0} | probing
    baselines.main(parse(baselines.Params, content, source="params.yaml"), run)
    return json.loads(Path("metrics/baselines.json").read_text())["baselines"]


def test_rows_are_the_base_s_features_and_need_no_checkpoint(
    trained_project: Run, tiny_params: dict[str, Any]
):
    found = call(trained_project, tiny_params)
    assert (found["protocol"], found["split"]) == ("logistic", "val")
    rows = found["rows"]
    assert rows["chance"] == {"top1": pytest.approx(1 / 3, rel=1e-5)}
    widths = {"base_pooled": 96, "base_cleanest": 32, "base_cleanest_unpooled": 128}
    widths |= {"untrained_head": 16}
    assert {name: row["width"] for name, row in rows.items() if name != "chance"} == widths
    assert all({"top1", "interval", "c", "converged"} <= set(rows[name]) for name in widths)
    # the pooled maps are those of features.model: base
    folders = ModelFolders(Path("build/pretrain"), Path("build/base"), Path())
    params = FeaturesParams.model_validate(TINY["features"] | {"model": "base", "pool": "mean"})
    model = load_feature_model(params, folders, 0, torch.device("cpu"))
    stored = {"images": Path("build/shards"), "latents": Path("build/latents"), "batch_size": 24}
    train, val = (
        compute_features(model, stored_batches(**stored, split=s)) for s in ("train", "val")
    )
    dev = torch.tensor([is_dev(key) for key in train.keys])
    fold = tuple(rows.nonzero().squeeze(1).numpy() for rows in (~dev, dev))
    pairs = ((each.features.half(), each.labels) for each in (train, val))
    expected = logistic_score(*pairs, num_classes=3, cs=TINY["probe"]["cs"], folds=[fold])
    assert rows["base_pooled"]["top1"] == pytest.approx(expected.accuracy.top1)
    assert rows["base_pooled"]["c"] == expected.c
    assert list((trained_project.root / ".work").rglob("*.safetensors")) == []
    (Path("build/pretrain") / "model.safetensors").unlink()
    assert call(trained_project, tiny_params) == found


def test_fewer_rows_and_the_sgd_protocol(trained_project: Run, tiny_params: dict[str, Any]):
    off = {"headline": "sgd", "cs": [], "few_labels": [], "head": "attentive"}
    found = call(trained_project, tiny_params, baselines="pooled", **off)
    assert found["protocol"] == "sgd"
    assert "c" not in found["rows"]["base_pooled"]
    assert set(found["rows"]) == {"chance", "base_pooled", "base_cleanest", "untrained_head"}
    assert set(call(trained_project, tiny_params, baselines="none")["rows"]) == {"chance"}


def test_too_little_room_is_found_first(
    trained_project: Run, tiny_params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    full = lambda _: SimpleNamespace(free=0)  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", full)
    with pytest.raises(ValueError, match=r'set probe\.baselines to "pooled" or "none"'):
        call(trained_project, tiny_params)
