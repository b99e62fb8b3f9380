"""The reference of scores: features of real images, and a card of what they were made from.

build/reference/<resizer>.safetensors: a FeatureSet each; build/reference/reference.json: the card
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from contradiff.config import Section, read_card
from contradiff.data.shards import Shard
from contradiff.evaluation.extractors import ExtractorCard
from contradiff.evaluation.measuring import FeatureSet
from contradiff.files import replace_dir

CARD_NAME = "reference.json"


class ReferenceParams(Section):
    """Section `reference`: the real images that generated ones are compared with."""

    split: Literal["val", "train"] = Field(description="Table 4: val")
    num_kept: int = Field(
        gt=0, description="at most so many images' features are kept, for KID and precision"
    )
    batch_size: int = Field(gt=0)


class ReferenceCard(Section):
    """What reference.json says: which images, brought to which size, seen by which extractor."""

    split: str
    num_images: int = Field(gt=0)
    image_size: int = Field(gt=0)
    images_sha256: str
    extractor: str
    extractor_sha256: str
    resizers: list[str] = Field(min_length=1)
    num_kept: int = Field(gt=0)
    seed: int

    @property
    def description(self) -> str:
        """The reference in words, as it stands beside every score."""
        return f"{self.num_images} {self.split} images, centre crop {self.image_size} px"


def fingerprint_of(shards: Sequence[Shard]) -> str:
    """SHA-256 of the shards' own digests, in order: names the images."""
    digests = [shard.sha256 for shard in shards]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def write_reference(folder: Path, card: ReferenceCard, features: Mapping[str, FeatureSet]) -> None:
    """Write the features of each resizer and the card; the folder is replaced as a whole."""
    with replace_dir(folder) as temporary:
        for resizer, feature_set in features.items():
            feature_set.save(temporary / f"{resizer}.safetensors")
        (temporary / CARD_NAME).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_reference_card(
    folder: Path, *, extractor: ExtractorCard, image_size: int
) -> ReferenceCard:
    """Read the card alone, and refuse a reference that scores with this extractor cannot use.

    Args:
        folder: for instance build/reference.
        extractor: of the extractor that the generated images will be seen by.
        image_size: of the generated images, in pixels.

    Raises:
        ValueError: the card is missing or wrong, or the reference was made with another extractor,
            other resizers or another size; names it.
    """
    path = folder / CARD_NAME
    card = read_card(ReferenceCard, path, stage="reference")
    wanted = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.weights_sha256,
        "resizers": list(extractor.resizers),
        "image_size": image_size,
    }
    for name, value in wanted.items():
        if (found := getattr(card, name)) != value:
            raise ValueError(
                f"{path}: the reference was made with {name} {found}, these scores need {value}: "
                "run `dvc repro score`, or the stage reference again"
            )
    return card


def read_reference(folder: Path, card: ReferenceCard) -> dict[str, FeatureSet]:
    """Read the features of a reference, by resizer.

    Raises:
        ValueError: a file is missing, or is not what the card describes.
    """
    features: dict[str, FeatureSet] = {}
    for resizer in card.resizers:
        path = folder / f"{resizer}.safetensors"
        found = FeatureSet.load(path)
        source = found.statistics.source
        told = (card.extractor, card.extractor_sha256, resizer, card.num_images)
        if told != (
            source.extractor,
            source.fingerprint,
            source.resizer,
            found.statistics.num_samples,
        ):
            raise ValueError(
                f"{path}: not the features that {CARD_NAME} describes: run the stage reference"
            )
        features[resizer] = found
    return features
