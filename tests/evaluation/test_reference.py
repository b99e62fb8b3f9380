"""A reference of anything else is refused by name."""

import json
from pathlib import Path

import pytest
import torch

from contradiff.data.shards import Shard
from contradiff.evaluation.extractors import ExtractorCard
from contradiff.evaluation.fid import FeatureSource, FeatureStatistics
from contradiff.evaluation.measuring import Measurement
from contradiff.evaluation.reference import (
    ReferenceCard,
    fingerprint_of,
    read_reference,
    read_reference_card,
    write_reference,
)

EXTRACTOR = ExtractorCard(
    kind="inception",
    name="inception",
    resizers=["clean", "legacy_tensorflow"],
    num_features=3,
    num_classes=4,
    weights_sha256="1" * 64,
)
CARD = ReferenceCard(
    split="val",
    num_images=7,
    image_size=32,
    images_sha256="2" * 64,
    extractor="inception",
    extractor_sha256="1" * 64,
    resizers=["clean", "legacy_tensorflow"],
    num_kept=5,
    seed=0,
)


def measurement(resizer: str, *, images: str = CARD.description) -> Measurement:
    source = FeatureSource(images, resizer, extractor="inception", fingerprint="1" * 64)
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    statistics = FeatureStatistics(3, source=source)
    statistics.update(values)
    return Measurement(statistics, values[:5], torch.empty(0, 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_reference(
        tmp_path / "reference", CARD, {name: measurement(name) for name in EXTRACTOR.resizers}
    )
    return tmp_path / "reference"


def test_written_and_read(folder: Path):
    card = read_reference_card(folder, extractor=EXTRACTOR, image_size=32)
    assert card == CARD
    assert card.description == "7 val images, centre crop 32 px"
    found = read_reference(folder, card)
    assert list(found) == ["clean", "legacy_tensorflow"]
    assert torch.equal(found["clean"].statistics.mean, measurement("clean").statistics.mean)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"name": "domain-classifier"}, "extractor inception, these scores need domain-classifier"),
        ({"weights_sha256": "3" * 64}, "extractor_sha256 111"),
        ({"resizers": ["clean"]}, r"resizers \['clean', 'legacy_tensorflow'\]"),
    ],
)
def test_reference_of_another_extractor_or_resizer_is_refused(
    folder: Path, changes: dict[str, object], name: str
):
    other = EXTRACTOR.model_copy(update=changes)
    with pytest.raises(ValueError, match=f"reference.json: the reference was made with {name}"):
        read_reference_card(folder, extractor=other, image_size=32)


def test_other_sizes_and_damaged_cards_are_refused(folder: Path):
    with pytest.raises(ValueError, match="made with image_size 32, these scores need 64"):
        read_reference_card(folder, extractor=EXTRACTOR, image_size=64)
    path = folder / "reference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 1}))
    with pytest.raises(ValueError, match="more: unknown key"):
        read_reference_card(folder, extractor=EXTRACTOR, image_size=32)
    path.unlink()
    with pytest.raises(ValueError, match="run the stage reference first"):
        read_reference_card(folder, extractor=EXTRACTOR, image_size=32)


@pytest.mark.parametrize(
    "wrong", [measurement("legacy_tensorflow"), measurement("clean", images="6 val images")]
)
def test_measurements_that_are_not_the_cards_are_refused(folder: Path, wrong: Measurement):
    wrong.save(folder / "clean.safetensors")
    with pytest.raises(ValueError, match=r"clean.safetensors: not the measurement that reference"):
        read_reference(folder, CARD)


def test_the_fingerprint_names_the_images():
    shards = [Shard("a", 1, 2, "4" * 64), Shard("b", 1, 2, "5" * 64)]
    assert fingerprint_of(shards) != fingerprint_of(shards[::-1])
    assert fingerprint_of(shards) == fingerprint_of(list(shards))
