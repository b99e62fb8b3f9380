"""contradiff.evaluation.extractors: both kinds, their files, streaming, with small stand-ins."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from contradiff.atomic import sha256_of
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import (
    INCEPTION_URL,
    ExtractorParams,
    load_extractor,
    read_card,
    resize_clean,
    save_classifier,
    save_inception,
    score_images,
)
from contradiff.evaluation.frechet import frechet_distance
from contradiff.evaluation.inception_score import inception_score

CPU = torch.device("cpu")
PARAMS = {
    "kind": "classifier",
    "weights": None,
    "width": 32,
    "epochs": 12,
    "batch_size": 64,
    "lr": 0.003,
}


class StandIn(nn.Module):
    """Inception's signature and parts, with a few random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, 4, stride=32), nn.ReLU(), nn.AvgPool2d(10))
        self.output = nn.Linear(2048, 4)

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,  # noqa: ARG002
        no_output_bias: bool = False,
    ) -> Tensor:
        features = self.layers((img.to(torch.float32) - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return F.softmax(F.linear(features, self.output.weight, bias), dim=1)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(StandIn()).save(str(path))
    return path


@pytest.fixture
def classifier() -> ResidualClassifier:
    torch.manual_seed(0)
    return ResidualClassifier(width=4, num_classes=3).eval()


def pictures(n: int, *, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def save(folder: Path, classifier: ResidualClassifier):
    return save_classifier(folder, classifier, image_size=16, val_accuracy=0.9, val_count=50)


# --- Parameters ---------------------------------------------------------------------------------


def test_params():
    assert ExtractorParams.model_validate(PARAMS).kind == "classifier"
    with pytest.raises(ValidationError, match=r"extractor.weights is set"):
        ExtractorParams.model_validate(PARAMS | {"weights": "x.pt"})
    with pytest.raises(ValidationError, match=r"extractor.weights is null") as error:
        ExtractorParams.model_validate(PARAMS | {"kind": "inception"})
    assert INCEPTION_URL in str(error.value)
    assert "No network" in str(error.value)


# --- The classifier -----------------------------------------------------------------------------


def test_classifier_survives_saving(tmp_path: Path, classifier: ResidualClassifier):
    card = save(tmp_path / "extractor", classifier)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    assert extractor.card == card == read_card(tmp_path / "extractor")
    assert (extractor.name, extractor.resizer, extractor.num_features) == (
        "domain-classifier",
        "none",
        8,
    )
    images = pictures(5)
    with torch.no_grad():
        expected = classifier(images)
    torch.testing.assert_close(extractor(images), expected, rtol=0, atol=0)
    assert card.weights_sha256 == sha256_of(tmp_path / "extractor" / "extractor.safetensors")


def test_the_classifier_is_never_called_inception(tmp_path: Path, classifier: ResidualClassifier):
    save(tmp_path / "extractor", classifier)
    assert "inception" not in (tmp_path / "extractor" / "extractor.json").read_text().lower()


def test_classifier_refuses_other_sizes(tmp_path: Path, classifier: ResidualClassifier):
    save(tmp_path / "extractor", classifier)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    with pytest.raises(ValueError, match="16x16 pixels, not 16x20"):
        extractor(pictures(2, width=20))


def test_load_refuses_wrong_files(tmp_path: Path, classifier: ResidualClassifier):
    folder = tmp_path / "extractor"
    with pytest.raises(ValueError, match="run the stage extractor first"):
        load_extractor(folder, device=CPU)
    save(folder, classifier)
    card = folder / "extractor.json"
    content = json.loads(card.read_text())
    card.write_text(json.dumps(content | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"not the weights that extractor.json describes"):
        load_extractor(folder, device=CPU)
    card.write_text(json.dumps(content | {"more": 1}))
    with pytest.raises(ValueError, match="more: unknown key"):
        load_extractor(folder, device=CPU)
    card.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_extractor(folder, device=CPU)


# --- Inception ----------------------------------------------------------------------------------


def test_inception_equals_the_scripts_own_outputs(tmp_path: Path, script: Path):
    """At 299 pixels the script does not resize either, so it says what it should say."""
    card = save_inception(tmp_path / "extractor", script, sha256=sha256_of(script))
    assert (card.num_features, card.num_classes, card.val_accuracy) == (2048, 4, None)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    assert extractor.resizer == "clean"
    images = pictures(3, height=299, width=299)
    features, logits = extractor(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(script)
    with torch.no_grad():
        expected_features = module(images, return_features=True)
        expected = module(images, no_output_bias=True)
    torch.testing.assert_close(features, expected_features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.softmax(1), expected, rtol=1e-4, atol=1e-5)


def test_inception_equals_clean_fid(tmp_path: Path, script: Path):
    """The peer's own wrapper and resizer, one image at a time."""
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    save_inception(tmp_path / "extractor", script, sha256=sha256_of(script))
    images = pictures(3, height=64, width=48)
    features, _ = load_extractor(tmp_path / "extractor", device=CPU)(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = InceptionV3W(str(tmp_path), download=False)
    resize = build_resizer("clean")
    for image, ours in zip(images, features, strict=True):
        resized = resize(image.permute(1, 2, 0).numpy())
        with torch.no_grad():
            expected = peer(torch.from_numpy(resized).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (256, 256), (299, 299), (700, 400)])
def test_resize_equals_clean_fids(height: int, width: int):
    from cleanfid.resize import build_resizer

    image = pictures(1, height=height, width=width)
    expected = build_resizer("clean")(image[0].permute(1, 2, 0).numpy())
    ours = resize_clean(image, side=299)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() < 0.01  # of 255 grey levels, on noise: the worst case


def test_inception_refuses_missing_and_other_files(tmp_path: Path, script: Path):
    folder = tmp_path / "extractor"
    with pytest.raises(ValueError, match=r"extractor.weights: .*absent.pt does not exist") as error:
        save_inception(folder, tmp_path / "absent.pt")
    assert INCEPTION_URL in str(error.value)
    assert "No network" in str(error.value)
    with pytest.raises(ValueError, match="its sha256 is"):
        save_inception(folder, script)
    nonsense = tmp_path / "nonsense.pt"
    nonsense.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no TorchScript file"):
        save_inception(folder, nonsense, sha256=sha256_of(nonsense))
    other = tmp_path / "other.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.ReLU()).save(str(other))
    with pytest.raises(ValueError, match="has not Inception's parts"):
        save_inception(folder, other, sha256=sha256_of(other))
    assert not folder.exists()


# --- Streaming ----------------------------------------------------------------------------------


def test_score_images_streams(tmp_path: Path, classifier: ResidualClassifier):
    save(tmp_path / "extractor", classifier)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    images = pictures(50)
    done = []
    statistics, probabilities = score_images(
        iter(images.split(16)), extractor, reference="val", on_progress=done.append
    )
    features, logits = extractor(images)
    assert done == [16, 32, 48, 50]
    assert statistics.num_samples == 50
    assert statistics.source.reference == "val"
    assert statistics.source.fingerprint == extractor.card.weights_sha256
    np.testing.assert_allclose(statistics.mean, features.double().mean(0), rtol=1e-5)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    others, _ = score_images(pictures(40, seed=1).split(40), extractor, reference="samples")
    assert frechet_distance(statistics, others) >= 0
    assert inception_score(probabilities, splits=5)[0] >= 1


def test_score_images_refuses_nothing(tmp_path: Path, classifier: ResidualClassifier):
    save(tmp_path / "extractor", classifier)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    with pytest.raises(ValueError, match="no images to score in samples"):
        score_images([], extractor, reference="samples")
