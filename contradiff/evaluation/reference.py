"""The reference: measurements of real images, in reference.json and `<resizer>.safetensors`."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from contradiff.config import Section, read_card
from contradiff.evaluation.extractors import ExtractorCard
from contradiff.evaluation.fid import FeatureSource
from contradiff.evaluation.measuring import Measurement
from contradiff.files import replace_dir, sha256_of

CARD_NAME = "reference.json"


class ReferenceCard(Section):
    """Contents of reference.json: which images were measured, at which size, by which extractor."""

    split: str
    num_images: int = Field(gt=0)
    image_size: int = Field(gt=0)
    images_sha256: str
    extractor: str
    extractor_sha256: str
    resizers: list[str] = Field(min_length=1)
    num_kept: int = Field(gt=0)
    seed: int
    sha256: dict[str, str] = Field(default={}, description="resizer => SHA-256 of its measurement")

    @property
    def description(self) -> str:
        """The reference in words, as every score quotes it."""
        return f"{self.num_images} {self.split} images, centre crop {self.image_size} px"


def write_reference(
    folder: Path, card: ReferenceCard, measurements: Mapping[str, Measurement]
) -> None:
    """Replace `folder` by reference.json and a measurement for each resizer."""
    with replace_dir(folder) as temporary:
        digests: dict[str, str] = {}
        for resizer, measurement in measurements.items():
            measurement.save(path := temporary / f"{resizer}.safetensors")
            digests[resizer] = sha256_of(path)
        card = card.model_copy(update={"sha256": digests})
        (temporary / CARD_NAME).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_reference(
    folder: Path, *, extractor: ExtractorCard, image_size: int
) -> tuple[ReferenceCard, dict[str, Measurement]]:
    """Read a reference's card, and its measurement for each resizer.

    Raises ValueError if a file is missing or malformed, or has another extractor or image size.
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
                f"{path}: the reference was made with {name} {found}, but these scores need "
                f"{value}; run `dvc repro score`"
            )
    paths = {resizer: folder / f"{resizer}.safetensors" for resizer in card.resizers}
    remedy = f"run `dvc repro reference`, or fetch it with `dvc pull {folder}`"
    measurements = {
        resizer: Measurement.load(path, sha256=card.sha256.get(resizer, "nothing"), remedy=remedy)
        for resizer, path in paths.items()
    }
    for resizer, path in paths.items():
        described = FeatureSource(card.description, resizer, card.extractor, card.extractor_sha256)
        if measurements[resizer].statistics.source != described:
            raise ValueError(
                f"{path}: not the measurement that {CARD_NAME} describes; run the stage "
                "`reference` again"
            )
    return card, measurements
