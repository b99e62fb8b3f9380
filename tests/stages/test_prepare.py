"""stages.prepare: what is given beside images stands in manifests; what is missing is named."""

from stages.runtime.run import Run

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contradiff.config import parse, read_params
from stages import prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def content(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """The embedded default on few images, with a base of the user's own."""
    content = copy.deepcopy(read_params(ROOT / "presets/tiny.yaml"))
    content["data"] |= {"num_train": 12, "num_val": 12, "image_size": 16}
    shutil.copytree(tiny_base, tmp_path / "mine")
    content["base"]["path"] = "mine"
    for section in ("pretrain", "class_condition", "extractor"):
        content[section]["batch_size"] = 12
    content["extractor"]["width"], content["score"]["kid_subset_size"] = 2, 12
    content["probe"]["cs"] = []  # no image is in the dev split
    return content


@pytest.fixture
def run(run_of: Callable[[str], Run]) -> Run:
    return run_of("prepare")


def manifests(content: dict[str, Any], run: Run) -> dict[str, Any]:
    prepare.main(parse(prepare.Params, content, source="params.yaml"), run)
    files = Path("build/manifest").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in files}


def test_a_changed_base_has_another_manifest(content: dict[str, Any], run: Run):
    before = manifests(content, run)
    assert manifests(content, run) == before
    assert before["extractor"] == before["timm"] == {}
    # where later stages find what was rendered
    for name, place in (("images", "data/raw/toy"), ("transfer", "data/raw/digits")):
        assert Path(before[name]["root"]).parent == Path(place)
        assert (run.root / before[name]["root"] / "train").exists()
    for changed in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        path = Path("mine") / changed
        content_of = bytearray(path.read_bytes() + b"\n" * (path.suffix == ".json"))
        content_of[-1] ^= path.suffix != ".json"
        path.write_bytes(content_of)
        after = manifests(content, run)
        assert {name for name in before if before[name] != after[name]} == {"base"}
        before = after
    content["base"] = {"source": "hub", "path": "somebody/model", "revision": "a" * 40}
    assert manifests(content, run)["base"] == {"path": "somebody/model", "revision": "a" * 40}


def test_given_weights_are_noticed(content: dict[str, Any], run: Run):
    content["extractor"]["weights"] = "inception.pt"
    content["features"] |= {"timm_weights": "dino.safetensors", "timm_name": "test_vit"}
    for name in ("inception.pt", "dino.safetensors"):
        Path(name).write_text("weights")
    before = manifests(content, run)
    Path("dino.safetensors").write_text("weightz")
    after = manifests(content, run)
    assert {name for name in before if before[name] != after[name]} == {"timm"}
    Path("inception.pt").write_text("weightz")
    assert manifests(content, run)["extractor"] != after["extractor"]
    content["extractor"] |= {"weights": "not there", "download": True}
    assert manifests(content, run)["extractor"] == {}


def test_all_that_is_missing_is_named_at_once(content: dict[str, Any], run: Run):
    content["data"] |= {"source": "auto", "root": "nowhere", "num_train": None, "num_val": None}
    content["base"]["path"] = "neither"
    content["extractor"]["weights"] = "inception.pt"
    content["features"] |= {"timm_weights": "dino.safetensors", "timm_name": "no_such_model"}
    with pytest.raises(ValueError, match=r"base\.path: there is no folder neither") as caught:
        manifests(content, run)
    for fault in (
        "extractor.weights: no file inception.pt; ",
        "features.timm_weights: no file dino.safetensors; ",
        "data.root: ",
    ):
        assert f"\n{fault}" in str(caught.value)
    assert str(caught.value).startswith("features.timm_name: timm ")
    assert not Path("build").exists()


def test_weights_that_do_not_fit_are_refused(content: dict[str, Any], run: Run):
    path = Path("mine/vae/diffusion_pytorch_model.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"^base\.path: .*/vae/diffusion_.* damaged or incomplete"):
        manifests(content, run)


def test_a_base_is_checked_again_only_after_a_change(
    content: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
):
    checked: list[Path] = []
    monkeypatch.setattr("contradiff.base.weights.check_weights", checked.append)
    first = manifests(content, run)
    assert manifests(content, run) == first
    assert checked == [Path("mine")]
    path = Path("mine/unet/diffusion_pytorch_model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    manifests(content, run)
    monkeypatch.setattr(prepare, "code_digest", lambda: "other code")
    manifests(content, run)
    assert len(checked) == 3
    (run.root / ".work/checked_base.json").write_bytes(b"\xff")
    manifests(content, run)
    manifests(content, run)
    assert len(checked) == 4

    def refuse(_: Path) -> None:
        raise ValueError("base.path: bad")

    path.write_bytes(path.read_bytes()[:-1] + b"y")
    monkeypatch.setattr("contradiff.base.weights.check_weights", refuse)
    for _ in range(2):  # a base that was refused is checked each time
        with pytest.raises(ValueError, match=r"base\.path: bad"):
            manifests(content, run)


def test_more_than_the_images_that_there_are_is_refused_at_once(content: dict[str, Any], run: Run):
    content["pretrain"]["batch_size"] = content["class_condition"]["batch_size"] = 16
    content["class_condition"]["epochs"] = 1
    content["transfer"]["shots"] = [25, 61]
    expected = r"^pretrain\.batch_size: 16 is more than the 12"
    with pytest.raises(ValueError, match=expected) as caught:
        manifests(content, run)
    assert "\nclass_condition.batch_size: 16 is more than the 12 training" in str(caught.value)
    assert "\ntransfer.shots: 61 is too large: class " in str(caught.value)
    assert not Path("build").exists()
    content["pretrain"]["epochs"] = content["class_condition"]["epochs"] = 0
    content["transfer"]["shots"] = [60, "full"]
    assert manifests(content, run)
    # a damaged transfer set is found before any work
    [test] = Path("data/raw/digits").glob("*/test")
    test.write_bytes(test.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"/test: "):
        manifests(content, run)
