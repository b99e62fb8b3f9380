"""stages.transfer: from a folder of images to scores of several shots, frozen and fine-tuned."""

from stages._runtime import Run

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contradiff.atomic import sha256_of
from contradiff.config import parse
from contradiff.data.raw import transfer_manifest
from stages import transfer
from tests.settings import TINY

CONTENT: dict[str, Any] = {
    "seed": 3,
    "data": {
        "source": "imagefolder",
        "root": "data/raw/none",
        "image_size": 32,
        "num_train": None,
        "num_val": None,
    },
    "features": TINY["features"] | {"batch_size": 4},
    "transfer_data": {"source": "imagefolder", "root": "images", "verify": True},
    "transfer": {
        "shots": [2, 1, "full"],
        "num_splits": 2,
        "ridge": 1.0,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "batch_size": 4,
        "epochs": 2,
        "warmup_epochs": 0,
        "finetune_epochs": 1,
        "finetune_lr": 0.001,
        "finetune_weight_decay": 0.05,
        "finetune_batch_size": 4,
    },
}


@pytest.fixture
def project(trained_project: Run) -> Run:
    """With a set of two classes of flat colours, some 40 x 36 pixels large."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("test", 3)):
        for label, name in enumerate(("dark", "light")):
            folder = Path("images") / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                colour = rng.integers(0, 80, 3) + 170 * label
                pixels = np.broadcast_to(colour.astype(np.uint8), (40, 36, 3))
                Image.fromarray(pixels.copy()).save(folder / f"{index}.png")
    write_manifest()
    return trained_project


def write_manifest() -> None:
    manifest = transfer_manifest(Path("images"), source="imagefolder", shown_root="images")
    transfer.MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    transfer.MANIFEST.write_text(json.dumps(manifest))


def call(run: Run, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the stage; returns the metrics and the splits."""
    content = copy.deepcopy(CONTENT)
    content["transfer"] |= changes
    transfer.main(parse(transfer.Params, content, source="params.yaml"), run)
    metrics = json.loads(Path("metrics/transfer.json").read_text())["transfer"]
    return metrics, json.loads(Path("build/transfer/splits.json").read_text())["splits"]


def test_several_shots_frozen_and_finetuned(project: Run):
    checkpoint = Path("build/pretrain/model.safetensors")
    before = sha256_of(checkpoint)
    metrics, splits = call(project)
    assert sha256_of(checkpoint) == before
    assert (metrics["shots"], metrics["num_splits"], metrics["total"]) == (2, 2, 6)
    assert list(metrics["by_shots"]) == ["1", "2", "full"]
    for shots, number, size in (("1", 2, 2), ("2", 2, 4), ("full", 1, 8)):
        found, drawn = metrics["by_shots"][shots], splits[shots]
        assert found["num_splits"] == len(drawn) == number
        for index, split in enumerate(drawn):
            assert split["seed"] == 3 + index
            assert len(split["indices"]) == size
            labels = [Path(key).parent.name for key in split["keys"]]
            assert labels.count("dark") == labels.count("light") == size // 2
            assert set(split["top1"]) == {"finetuned", "ridge", "sgd"}
        for kind in ("finetuned", "ridge", "sgd"):
            top1 = [split["top1"][kind] for split in drawn]
            assert found[kind]["mean"] == pytest.approx(np.mean(top1), rel=1e-5)
    assert metrics["ridge"] == metrics["by_shots"]["2"]["ridge"]
    # fine-tuning changes nothing of the frozen features' scores
    frozen, _ = call(project, finetune_epochs=0)
    assert "finetuned" not in frozen
    assert frozen["by_shots"]["full"]["ridge"] == metrics["by_shots"]["full"]["ridge"]
    assert frozen["sgd"] == metrics["sgd"]


def test_changed_data_is_refused(project: Run):
    path = Path("images/test/dark/0.png")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"transfer_data\.root: images has changed since"):
        call(project)
    write_manifest()
    Path("images/train/dark/9.png").write_text("no image")
    write_manifest()
    with pytest.raises(ValueError, match=r"train/dark/9\.png: not a readable image"):
        call(project)


@pytest.mark.parametrize(("key", "value"), [("pool", "mean"), ("noising", "ddim_chain")])
def test_finetuning_needs_the_head_and_direct_noise(key: str, value: str):
    content = copy.deepcopy(CONTENT)
    content["features"][key] = value
    with pytest.raises(ValueError, match=rf"transfer\.finetune_epochs: .*features\.{key}"):
        parse(transfer.Params, content, source="params.yaml")
    content["transfer"]["finetune_epochs"] = 0
    parse(transfer.Params, content, source="params.yaml")
