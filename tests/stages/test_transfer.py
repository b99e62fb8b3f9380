"""stages.transfer: from a folder of images to scores of several shots, frozen and fine-tuned."""

from stages.runtime.run import Run

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from contradiff.config import parse, read_params
from contradiff.downstream.transfer import TransferTask
from contradiff.features.models import LabelledFeatures
from contradiff.files import sha256_of
from contradiff.sources.transfer_set import TransferSet
from stages import transfer
from tests.settings import ARCHITECTURE, TINY

ROOT = Path(__file__).resolve().parents[2]
CONTENT: dict[str, Any] = ARCHITECTURE | {
    "seed": 3,
    "data": TINY["data"] | {"image_size": 32},
    "features": TINY["features"] | {"batch_size": 4},
    "transfer": TINY["transfer"]
    | {"shots": [2, 1, "full"], "num_splits": 2, "batch_size": 4, "epochs": 2, "warmup_epochs": 0}
    | {"finetune_epochs": 1, "finetune_batch_size": 4},
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
    manifest = TransferSet(Path("images"), "imagefolder").manifest(project=Path())
    transfer.MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    transfer.MANIFEST.write_text(json.dumps(manifest))


def call(run: Run, *, features: dict[str, Any] | None = None, **changes: Any) -> tuple[Any, Any]:
    """Run the stage; returns the metrics and the splits."""
    content = copy.deepcopy(CONTENT)
    content["transfer"] |= changes
    content["features"] |= features or {}
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
            assert (split["seed"], len(split["indices"])) == (3 + index, size)
            labels = [Path(key).parent.name for key in split["keys"]]
            assert labels.count("dark") == labels.count("light") == size // 2
            assert set(split["top1"]) == {"finetuned", "logistic", "ridge", "sgd"}
        for kind in ("finetuned", "logistic", "ridge", "sgd"):
            top1 = [split["top1"][kind] for split in drawn]
            assert found[kind]["mean"] == pytest.approx(np.mean(top1), rel=1e-5)
    assert metrics["ridge"] == metrics["by_shots"]["2"]["ridge"]
    assert metrics["protocol"] == "logistic"
    assert metrics["top1"] == metrics["logistic"] == metrics["by_shots"]["2"]["logistic"]
    # fine-tuning changes nothing of the frozen features' scores
    frozen, _ = call(project, finetune_epochs=0)
    assert "finetuned" not in frozen
    assert frozen["by_shots"]["full"]["ridge"] == metrics["by_shots"]["full"]["ridge"]
    assert frozen["sgd"] == metrics["sgd"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[LabelledFeatures]:
    """Every set of features that the stage computes."""
    found: list[LabelledFeatures] = []
    compute = TransferTask.compute_features

    def note(*args: Any) -> LabelledFeatures:
        found.append(compute(*args))
        return found[-1]

    monkeypatch.setattr(TransferTask, "compute_features", note)
    return found


def test_more_shots_change_nothing_of_the_others(project: Run, seen: list[LabelledFeatures]):
    changes = {"num_splits": 1, "features": {"condition": "noise"}}
    few, few_splits = call(project, shots=[2], **changes)
    many, many_splits = call(project, shots=[2, "full"], **changes)
    assert few["by_shots"]["2"] == many["by_shots"]["2"]
    assert few_splits["2"] == many_splits["2"]
    # two images a class are too coarse a score to tell: the features themselves
    used, _, everything, _ = seen
    places = [everything.keys.index(key) for key in used.keys]
    assert places == few_splits["2"][0]["indices"] != list(range(4))
    expected = everything[torch.tensor(places)].features
    torch.testing.assert_close(used.features, expected, atol=1e-5, rtol=1e-5)


def test_timm_sees_its_own_size_and_no_vae(
    project: Run, seen: list[LabelledFeatures], monkeypatch: pytest.MonkeyPatch
):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    save_file(model.state_dict(), "w.safetensors")
    monkeypatch.setattr(transfer, "load_vae", lambda _: pytest.fail("a VAE for pixels"))
    weights = {"timm_name": "test_vit", "timm_weights": "w.safetensors"}
    features = {"model": "timm", "pool": "mean"} | weights
    call(project, features=features, shots=["full"], finetune_epochs=0)
    config = timm.data.resolve_model_data_config(model) | {"interpolation": "bicubic"}
    look = timm.data.create_transform(**config, is_training=False)
    for split in seen:
        # flat colours: every crop and every size of them is the same
        images = [look(Image.open(Path("images") / key)) for key in split.keys]
        with torch.no_grad():
            expected = model(torch.stack(images))
        torch.testing.assert_close(split.features, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(project: Run):
    with Path("params.yaml").open("w") as file:
        YAML().dump(read_params(ROOT / "presets/tiny.yaml") | CONTENT, file)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
    results: list[list[bytes]] = []
    for count in ("1", "2"):
        command = [sys.executable, "-m", "stages.transfer"]
        subprocess.run(command, check=True, env=environment | {"CONTRADIFF_NUM_PROCESSES": count})
        files = (Path("build/transfer/splits.json"), Path("metrics/transfer.json"))
        results.append([path.read_bytes() for path in files])
    assert results[0] == results[1]
    assert b"finetuned" in results[0][1]
    assert project.is_main


def test_changed_data_is_refused(project: Run):
    path = Path("images/test/dark/0.png")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"transfer_data\.root: .*/images has changed since"):
        call(project)
    write_manifest()
    Path("images/train/dark/9.png").write_text("no image")
    write_manifest()
    with pytest.raises(ValueError, match=r"train/dark/9\.png: not a readable image"):
        call(project)
