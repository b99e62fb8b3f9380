"""Features must equal those of timm's own transform and forward pass."""

import io
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from contradiff.data.shards import read_images
from contradiff.features.batches import StoredImages
from contradiff.features.timm_backbone import TimmFeatures
from tests.settings import features_params

NAME = "test_vit"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save random weights of a backbone with a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(NAME, num_classes=5)
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


def load(weights: Path | None, name: str = NAME) -> TimmFeatures:
    local = None if weights is None else str(weights)
    settings = {"model": "timm", "pool": "mean", "timm_name": name, "timm_weights": local}
    return TimmFeatures(features_params(timm_pretrained=weights is None, **settings), Path(), CPU)


def test_features_are_timms_own(weights: Path, tiny_data: Path):
    features = load(weights)
    shards = StoredImages(tiny_data / "images", tiny_data / "latents", 4, num_threads=2)
    batches = list(features.read(shards, "val", 1))
    assert [batch.indices for batch in batches] == [(6, 7)]
    images = list(read_images(tiny_data / "images", "val"))[6:]
    assert [key for batch in batches for key in batch.keys] == [image.key for image in images]
    model = timm.create_model(NAME, num_classes=0, checkpoint_path="").eval()
    state = timm.models.load_state_dict(weights).items()
    model.load_state_dict({k: v for k, v in state if not k.startswith("head.")})
    config = timm.data.resolve_model_data_config(model)
    config["interpolation"] = "bicubic"
    transform = timm.data.create_transform(**config, is_training=False)
    pixels = torch.stack([transform(Image.open(io.BytesIO(image.image))) for image in images])
    shown = torch.cat([batch.pixels for batch in batches])
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    # we crop, then resize; timm resizes, then crops: the pixels differ only at the border
    assert ((shown + 1) / 2 - (pixels * std + mean)).abs().mean() < 0.02
    with torch.no_grad():
        expected = model(((shown + 1) / 2 - mean) / std)
    [column] = features.columns
    found = torch.cat([features(batch)[column.name] for batch in batches])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.std(dim=0).min() > 0


def test_faults_are_named(weights: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^features\.timm_name: timm .* has no model 'vit_nano'"):
        load(weights, "vit_nano")
    with pytest.raises(ValueError, match=r"^features\.timm_weights: .*nowhere: no such file"):
        load(tmp_path / "nowhere")
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"^features\.timm_weights: .*not a safetensors file"):
        load(tmp_path / "w.safetensors")
    save_file({"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"^features\.timm_weights: .*do not fit"):
        load(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"^features\.timm_pretrained: .*could not be"):
        load(None, "resnet10t.c3_in1k")
