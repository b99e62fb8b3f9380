"""A saved checkpoint is loaded unchanged, and only with the same base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from contradiff.files import sha256_of
from contradiff.method.checkpoint import base_digest, load_checkpoint, read_checkpoint_card
from contradiff.method.model import ContraDiffModel
from contradiff.method.params import Architecture
from tests.settings import DAMAGES

Save = Callable[..., None]


@pytest.fixture
def model(build_tiny: Callable[..., ContraDiffModel]) -> ContraDiffModel:
    model = build_tiny().train()
    model.projector(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path, model: ContraDiffModel, save_tiny: Save) -> Path:
    folder = tmp_path / "pretrain"
    save_tiny(folder, model, num_steps=7, seed=3)
    return folder


@torch.no_grad()
def test_round_trip(checkpoint: Path, model: ContraDiffModel, tiny_base: Path):
    loaded = load_checkpoint(checkpoint, base=tiny_base)
    assert not loaded.training
    assert model.projector[1].running_mean.any()  # BatchNorm's statistics are part of the state
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    stored = load_file(checkpoint / "model.safetensors")
    assert stored.keys() == model.trained_state().keys()
    assert not any("base_layer" in name for name in stored)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 16, 16)
    assert loaded.predict(*inputs).equal(model.predict(*inputs))


def test_config_says_what_was_trained(checkpoint: Path, model: ContraDiffModel, tiny_base: Path):
    card = read_checkpoint_card(checkpoint)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert card.base_sha256 == base_digest(tiny_base)
    assert (card.image_size, card.num_steps, card.params["seed"]) == (32, 7, 3)
    assert card.parameters["trainable"] == trainable
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert card.parameters["frozen"] == frozen + 100
    assert card.sha256 == {"model.safetensors": sha256_of(checkpoint / "model.safetensors")}


def test_another_base_and_a_missing_checkpoint_are_refused(
    checkpoint: Path, tiny_base: Path, tmp_path: Path
):
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    (path,) = (other / "unet").glob("*.safetensors")
    weights = load_file(path)
    weights["conv_in.bias"] += 1e-3
    save_file(weights, path)
    with pytest.raises(ValueError, match="trained on another base"):
        load_checkpoint(checkpoint, base=other)
    with pytest.raises(ValueError, match="no such file; run `dvc repro pretrain`"):
        load_checkpoint(tmp_path, base=tiny_base)


def test_other_parameters_than_the_checkpoint_s_are_refused_by_key(
    checkpoint: Path, tiny_base: Path, tiny_params: dict[str, Any]
):
    def load(**head: str) -> ContraDiffModel:
        sections = tiny_params | {"head": tiny_params["head"] | head}
        expected = Architecture.model_validate(sections)
        return load_checkpoint(checkpoint, base=tiny_base, expected=expected)

    load()
    init = r"head\.init: params\.yaml has 'random', but {} was trained {}; run `dvc repro pretrain`"
    with pytest.raises(ValueError, match=init.format(checkpoint, "with 'identity'")) as caught:
        load(init="random", residual="none")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "head.residual",
        "head.init",
    ]
    config = json.loads((checkpoint / "config.json").read_text())
    del config["params"]["head"]["init"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=init.format(checkpoint, "before this parameter existed")):
        load(init="random")
    with pytest.raises(ValueError, match=r"config\.json: head\.init: missing"):
        load_checkpoint(checkpoint, base=tiny_base)


def test_an_earlier_checkpoint_is_replaced_whole(
    checkpoint: Path, model: ContraDiffModel, save_tiny: Save
):
    (checkpoint / "stale").touch()
    save_tiny(checkpoint, model, num_steps=8)
    assert sorted(p.name for p in checkpoint.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_refused_by_name(
    checkpoint: Path, tiny_base: Path, damage: Callable[[bytes], bytes]
):
    path = checkpoint / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    fault = rf"^{path}: damaged \(its sha256 is .*; run `dvc repro pretrain`"
    with pytest.raises(ValueError, match=fault):
        load_checkpoint(checkpoint, base=tiny_base)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(
    checkpoint: Path, model: ContraDiffModel, tiny_base: Path, save_tiny: Save
):
    with torch.no_grad():
        model.attention.requires_grad_(requires_grad=False)
        next(model.attention.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=r"the weight attention\..* is not finite"):
        save_tiny(checkpoint, model)
    path = checkpoint / "model.safetensors"
    save_file(model.trained_state(), path)
    card = json.loads((checkpoint / "config.json").read_text())
    card["sha256"][path.name] = sha256_of(path)
    (checkpoint / "config.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=rf"^{path}: .*attention\..* values that are not finite"):
        load_checkpoint(checkpoint, base=tiny_base)
