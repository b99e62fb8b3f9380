"""Parameters, files, and the classifier."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import Extractor, load_extractor
from contradiff.evaluation.inception_files import INCEPTION_URL
from contradiff.evaluation.params import ExtractorParams
from contradiff.files import sha256_of

CPU = torch.device("cpu")
PARAMS = {"kind": "classifier", "weights": None, "download": False, "resizers": ["none"]}
PARAMS |= {"width": 32, "epochs": 12, "batch_size": 64, "lr": 0.003}
INCEPTION = {"kind": "inception", "weights": "x", "resizers": ["clean"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "x.pt"}, 'weights: extractor.kind "classifier" loads no weights'),
        ({"download": True}, 'download: extractor.kind "classifier" downloads nothing'),
        ({"resizers": ["clean"]}, "resizes no images"),
        ({"resizers": []}, "at least 1 item"),
        (
            INCEPTION | {"weights": None},
            f"weights: null names no file.*{INCEPTION_URL}.*extractor.download",
        ),
        (INCEPTION | {"resizers": ["none"]}, 'cannot use "none"'),
        (INCEPTION | {"resizers": ["clean", "clean"]}, "lists a resizer twice"),
        (INCEPTION | {"resizers": ["bilinear"]}, "legacy_pytorch"),
    ],
)
def test_contradictory_params_are_refused(changes: dict[str, Any], message: str):
    assert ExtractorParams.model_validate(PARAMS).num_features == 64
    with pytest.raises(ValidationError, match=message):
        ExtractorParams.model_validate(PARAMS | changes)


def test_the_classifier_survives_saving_and_refuses_other_sizes(
    extractor: Extractor, classifier: ResidualClassifier, tmp_path: Path
):
    card = extractor.card
    assert (card.name, card.resizers, card.num_features) == ("domain-classifier", ["none"], 8)
    assert card.weights_sha256 == sha256_of(tmp_path / "extractor" / "extractor.safetensors")
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = classifier(images)
    prepared = [extractor.prepare(image, resizer="none") for image in images]
    found = extractor(torch.stack(prepared), resizer="none")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="16x16 pixels, not 16x20"):
        extractor.prepare(torch.zeros(3, 16, 20, dtype=torch.uint8), resizer="none")


@pytest.mark.parametrize(
    ("num_correct", "count", "chance", "is_weak"),
    [
        (10, 100, 0.1, True),  # at chance
        (22, 100, 0.1, True),  # the interval begins at 15.0%
        (30, 100, 0.1, False),  # at 21.9%
        (3, 4, 0.25, True),  # too few images to know, 30.1%
        (70, 100, 0.5, True),  # two classes: twice the chance would be 1
        (90, 100, 0.5, False),
        (100, 100, 1.0, True),  # one class teaches nothing
    ],
)
def test_only_a_classifier_clearly_above_chance_may_score(
    extractor: Extractor, num_correct: int, count: int, chance: float, is_weak: bool
):
    facts = {"val_accuracy": num_correct / count, "val_count": count, "val_chance": chance}
    weakness = extractor.card.model_copy(update=facts).weakness
    assert (weakness is not None) == is_weak
    assert weakness is None or "extractor.epochs" in weakness


@pytest.mark.usefixtures("extractor")
def test_load_refuses_wrong_files(tmp_path: Path):
    with pytest.raises(ValueError, match="run `dvc repro extractor`"):
        load_extractor(tmp_path / "absent", device=CPU)
    folder = tmp_path / "extractor"
    card = json.loads((folder / "extractor.json").read_text())
    other = {"weights_sha256": "0" * 64}, "but the file beside it says"
    for change, message in (other, ({"more": 1}, "more: unknown key")):
        (folder / "extractor.json").write_text(json.dumps(card | change))
        with pytest.raises(ValueError, match=message):
            load_extractor(folder, device=CPU)
