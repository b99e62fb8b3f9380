"""Parameters, files, and the classifier."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import (
    ExtractorParams,
    load_extractor,
    read_extractor_card,
    save_classifier,
)
from contradiff.evaluation.inception import INCEPTION_URL
from contradiff.files import sha256_of

CPU = torch.device("cpu")
PARAMS = {
    "kind": "classifier",
    "weights": None,
    "download": False,
    "resizers": ["none"],
    "width": 32,
    "epochs": 12,
    "batch_size": 64,
    "lr": 0.003,
}


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
        ExtractorParams.model_validate(PARAMS | {"kind": "inception", "resizers": ["clean"]})
    assert INCEPTION_URL in str(error.value)
    assert "extractor.download" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"download": True}, "extractor.download is of Inception"),
        ({"resizers": ["clean"]}, "sees images as they are"),
        ({"resizers": []}, "at least 1 item"),
        ({"kind": "inception", "weights": "x"}, "needs a resizer"),
        ({"kind": "inception", "weights": "x", "resizers": ["clean", "clean"]}, "names one twice"),
        ({"kind": "inception", "weights": "x", "resizers": ["bilinear"]}, "legacy_pytorch"),
    ],
)
def test_contradictory_params_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ExtractorParams.model_validate(PARAMS | changes)


# --- The classifier -----------------------------------------------------------------------------


def test_classifier_survives_saving(tmp_path: Path, classifier: ResidualClassifier):
    card = save(tmp_path / "extractor", classifier)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    assert extractor.card == card == read_extractor_card(tmp_path / "extractor")
    assert (card.name, card.resizers, card.num_features) == ("domain-classifier", ["none"], 8)
    images = pictures(5)
    with torch.no_grad():
        expected = classifier(images)
    torch.testing.assert_close(extractor(images, resizer="none"), expected, rtol=0, atol=0)
    assert card.weights_sha256 == sha256_of(tmp_path / "extractor" / "extractor.safetensors")


def test_the_classifier_is_never_called_inception(tmp_path: Path, classifier: ResidualClassifier):
    save(tmp_path / "extractor", classifier)
    assert "inception" not in (tmp_path / "extractor" / "extractor.json").read_text().lower()


def test_classifier_refuses_other_sizes(tmp_path: Path, classifier: ResidualClassifier):
    save(tmp_path / "extractor", classifier)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    with pytest.raises(ValueError, match="16x16 pixels, not 16x20"):
        extractor(pictures(2, width=20), resizer="none")


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
