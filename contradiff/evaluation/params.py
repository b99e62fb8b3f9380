"""Sections `extractor`, `reference` and `score` of params.yaml."""

from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Section
from contradiff.evaluation.inception_files import no_weights

Kind = Literal["classifier", "inception"]
Resizer = Literal["none", "clean", "legacy_tensorflow", "legacy_pytorch"]
"""Ways to resize images to Inception's 299 pixels. Another way can change a FID by more than 1."""

DENSITY_NEIGHBOUR = 5
"""k for density and coverage (Naeem et al., 2020)."""


class ExtractorParams(Section):
    """Section `extractor`: the network that generated images are scored with."""

    kind: Kind
    weights: str | None = Field(description="inception: path of its .pt or .pth file")
    download: bool = Field(description="inception: download the weights if the file is missing")
    resizers: list[Resizer] = Field(min_length=1, description="the first one gives the main scores")
    width: int = Field(ge=2, multiple_of=2, description="classifier: half the number of features")
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    lr: float = Field(gt=0)

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> "ExtractorParams":
        resizers, fault = self.resizers, ""
        if len(set(resizers)) < len(resizers):
            fault = f"extractor.resizers: {resizers} lists a resizer twice; remove one"
        elif self.kind == "inception" and self.weights is None:
            fault = no_weights("extractor.weights: null names no file")
        elif self.kind == "inception" and "none" in resizers:
            fault = 'extractor.resizers: extractor.kind "inception" cannot use "none"; set '
            fault += "extractor.resizers to [clean, legacy_tensorflow]"
        elif self.kind == "classifier" and self.weights is not None:
            fault = 'extractor.weights: extractor.kind "classifier" loads no weights; set '
            fault += 'extractor.weights to null, or extractor.kind to "inception"'
        elif self.kind == "classifier" and self.download:
            fault = 'extractor.download: extractor.kind "classifier" downloads nothing; set '
            fault += "extractor.download to false"
        elif self.kind == "classifier" and resizers != ["none"]:
            fault = f'extractor.resizers: {resizers}, but extractor.kind "classifier" resizes no '
            fault += "images; set extractor.resizers to [none]"
        if fault:
            raise ValueError(fault)
        return self

    @property
    def num_features(self) -> int:
        """The dimension of the features."""
        return 2 * self.width if self.kind == "classifier" else 2048


class ReferenceParams(Section):
    """Section `reference`: the real images that generated ones are compared with."""

    split: Literal["val", "train"] = Field(description="the paper uses val (Table 4)")
    num_kept: int = Field(gt=0, description="images whose features are kept, for KID and precision")
    batch_size: int = Field(gt=0, description="images that the extractor sees at once")


class ScoreParams(Section):
    """Section `score`: how generated images are scored."""

    splits: int = Field(gt=0, description="number of parts that the inception score averages over")
    batch_size: int = Field(gt=0, description="images that the extractor sees at once")
    kid_subsets: int = Field(gt=0, description="KID is the average over this many random subsets")
    kid_subset_size: int = Field(gt=DENSITY_NEIGHBOUR, description="images in each subset")
