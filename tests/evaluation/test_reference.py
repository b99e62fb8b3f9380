"""A reference of anything else is refused by name."""

from pathlib import Path

import pytest
import torch

from contradiff.evaluation.extractors import ExtractorCard
from contradiff.evaluation.fid import FeatureSource, FeatureStatistics
from contradiff.evaluation.measuring import Measurement
from contradiff.evaluation.reference import ReferenceCard, read_reference, write_reference
from tests.settings import DAMAGES

NAMES = {"resizers": ["clean", "legacy_tensorflow"]}
NETWORK = {"kind": "inception", "name": "inception", "num_features": 3, "num_classes": 4}
EXTRACTOR = ExtractorCard(weights_sha256="1" * 64, **NAMES, **NETWORK)
IMAGES = {"split": "val", "num_images": 7, "image_size": 32, "images_sha256": "2" * 64}
SETTINGS = {"extractor": "inception", "extractor_sha256": "1" * 64, "num_kept": 5, "seed": 0}
CARD = ReferenceCard(**IMAGES, **NAMES, **SETTINGS)


def measurement(resizer: str, *, images: str = CARD.description) -> Measurement:
    source = FeatureSource(images, resizer, extractor="inception", fingerprint="1" * 64)
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    return Measurement(FeatureStatistics.of(values, source=source), values[:5], torch.empty(0, 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_reference(tmp_path, CARD, {name: measurement(name) for name in EXTRACTOR.resizers})
    return tmp_path


def read(folder: Path, *, image_size: int = 32, **changes: object):
    extractor = EXTRACTOR.model_copy(update=changes)
    return read_reference(folder, extractor=extractor, image_size=image_size)


def test_written_and_read(folder: Path):
    with pytest.raises(ValueError, match="run `dvc repro reference`"):
        read(folder / "absent")
    card, found = read(folder)
    assert card.model_copy(update={"sha256": {}}) == CARD
    assert card.description == "7 val images, centre crop 32 px"
    assert list(found) == ["clean", "legacy_tensorflow"]
    assert torch.equal(found["clean"].statistics.mean, measurement("clean").statistics.mean)


def test_a_reference_for_other_images_is_refused(folder: Path):
    for name, value, fault in (
        (
            "name",
            "domain-classifier",
            "extractor inception, but these scores need domain-classifier",
        ),
        ("weights_sha256", "3" * 64, "extractor_sha256 111"),
        ("resizers", ["clean"], r"resizers \['clean', 'legacy_tensorflow'\]"),
        ("image_size", 64, "image_size 32, but these scores need 64"),
    ):
        message = f"reference.json: the reference was made with {fault}"
        with pytest.raises(ValueError, match=message):
            read(folder, **{name: value})


def test_measurements_that_are_not_the_cards_are_refused(folder: Path):
    for wrong in (measurement("legacy_tensorflow"), measurement("clean", images="6 val images")):
        good = measurement("legacy_tensorflow")
        write_reference(folder, CARD, {"clean": wrong, "legacy_tensorflow": good})
        with pytest.raises(ValueError, match=r"clean.safetensors: not the measurement that"):
            read(folder)


def test_a_damaged_measurement_is_refused(folder: Path):
    path = folder / "clean.safetensors"
    whole = path.read_bytes()
    for damage in DAMAGES.values():
        path.write_bytes(damage(whole))
        with pytest.raises(ValueError, match=r"clean.safetensors: damaged .*sha256 is another"):
            read(folder)
