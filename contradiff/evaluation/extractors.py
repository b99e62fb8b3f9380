"""Extractors: the networks whose features and classes the scores are made of.

`classifier` is trained here on the data's labels, so that scores need no download; its scores are
named "FID (domain classifier)". `inception` is the network of published FIDs.

images (b 3 h w) uint8 -> [resizer] -> features (b d), logits (b classes), both float32
"""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from contradiff.config import Section, read_card
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.inception import (
    PINNED,
    Inception,
    check_inception,
    load_inception,
    no_weights,
)
from contradiff.evaluation.resizers import Images, Resizer, inception_input
from contradiff.files import replace_dir, replace_file, sha256_of

Kind = Literal["classifier", "inception"]
Outputs = tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]

WEIGHTS_NAME: dict[Kind, str] = {"classifier": "extractor.safetensors", "inception": "inception.pt"}
CARD_NAME = "extractor.json"
NUM_INCEPTION_FEATURES = 2048


class ExtractorParams(Section):
    """Section `extractor`: the network that generated images are scored with."""

    kind: Kind
    weights: str | None = Field(
        description="inception: path of inception-2015-12-05.pt, or of the .pth of pytorch-fid"
    )
    download: bool = Field(description="inception: fetch weights that are not there")
    resizers: list[Resizer] = Field(
        min_length=1, description="scores are made with each, the first is the main one"
    )
    width: int = Field(ge=2, multiple_of=2, description="classifier: its features are 2·width")
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    lr: float = Field(gt=0)

    @model_validator(mode="after")
    def _weights_belong_to_inception(self) -> "ExtractorParams":
        if self.kind == "classifier" and self.weights is not None:
            raise ValueError(
                "extractor.weights is set, but extractor.kind classifier is trained here: "
                "set extractor.weights to null, or extractor.kind to inception"
            )
        if self.kind == "inception" and self.weights is None:
            raise ValueError(no_weights("extractor.weights is null"))
        if self.kind == "classifier" and self.download:
            raise ValueError(
                "extractor.download is of Inception; extractor.kind classifier is trained here"
            )
        return self

    @model_validator(mode="after")
    def _resizers_belong_to_the_kind(self) -> "ExtractorParams":
        if len(set(self.resizers)) < len(self.resizers):
            raise ValueError(f"extractor.resizers: {self.resizers} names one twice")
        if self.kind == "classifier" and self.resizers != ["none"]:
            raise ValueError(
                f"extractor.resizers is {self.resizers}, but extractor.kind classifier sees images "
                "as they are: set it to [none]"
            )
        if self.kind == "inception" and "none" in self.resizers:
            raise ValueError(
                "extractor.resizers: extractor.kind inception needs a resizer: "
                "[clean, legacy_tensorflow]"
            )
        return self

    @property
    def num_features(self) -> int:
        """Dimension of the features; there must be at least as many images."""
        return 2 * self.width if self.kind == "classifier" else NUM_INCEPTION_FEATURES


class ExtractorCard(Section):
    """What extractor.json says beside the weights."""

    kind: Kind
    name: str
    resizers: list[Resizer] = Field(min_length=1)
    num_features: int = Field(gt=0)
    num_classes: int = Field(gt=0)
    image_size: int | None = Field(description="side it was trained on; null: any")
    width: int | None = Field(description="of the classifier")
    val_accuracy: float | None = Field(ge=0, le=1, description="classifier: top-1 on val")
    val_count: int | None = Field(description="images that val_accuracy was measured on")
    weights_sha256: str


class Extractor(ABC):
    """A frozen network with features and classes.

    Attributes:
        card: all that is known of it, with the sha256 of its weights.
    """

    def __init__(self, card: ExtractorCard) -> None:
        self.card = card

    @abstractmethod
    def __call__(self, images: Images, *, resizer: Resizer) -> Outputs:
        """Features and logits of images in RGB from 0 to 255, on the extractor's device.

        Args:
            images: of one size.
            resizer: one of the card's.
        """


class ClassifierExtractor(Extractor):
    """The classifier trained here, on images of its own size only."""

    def __init__(
        self, classifier: ResidualClassifier, card: ExtractorCard, *, device: torch.device
    ) -> None:
        super().__init__(card)
        self._classifier = classifier.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Images, *, resizer: Resizer) -> Outputs:
        """Features and logits.

        Raises:
            ValueError: the images have another size than the training images.
        """
        assert resizer == "none", "the classifier sees images as they are"
        side = self.card.image_size
        if images.shape[2:] != (side, side):
            height, width = images.shape[2:]
            raise ValueError(
                f"the extractor was trained on images of {side}x{side} pixels, not {height}x{width}"
                ": run the stage extractor again on the data that is scored"
            )
        return self._classifier(images.to(self._device))


class InceptionExtractor(Extractor):
    """Inception of 2015; images are resized in batches, where the peers take them one by one."""

    def __init__(self, network: Inception, card: ExtractorCard, *, device: torch.device) -> None:
        super().__init__(card)
        self._network = network.to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Images, *, resizer: Resizer) -> Outputs:
        """Features of the last pooling, and logits without bias.

        Raises:
            ValueError: Inception has no such resizer.
        """
        pixels = inception_input(images.to(self._device), resizer=resizer)
        # Convolutions on NVIDIA GPUs round to 10 bits (TF32) unless told not to, which would tell
        # in the third digit of a score.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._network(pixels)


def save_classifier(
    folder: Path,
    classifier: ResidualClassifier,
    *,
    image_size: int,
    val_accuracy: float,
    val_count: int,
) -> ExtractorCard:
    """Write a trained classifier and its extractor.json; the folder is replaced as a whole.

    Args:
        folder: for instance build/extractor.
        classifier: as from `train_classifier`.
        image_size: side of the images it was trained on, in pixels.
        val_accuracy: its top-1 accuracy in [0, 1].
        val_count: on how many images that was measured.
    """
    from safetensors.torch import save_file

    state = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    with replace_dir(folder) as temporary:
        weights = temporary / WEIGHTS_NAME["classifier"]
        save_file(state, weights)
        card = ExtractorCard(
            kind="classifier",
            name="domain-classifier",
            resizers=["none"],
            num_features=classifier.num_features,
            num_classes=classifier.num_classes,
            image_size=image_size,
            width=classifier.width,
            val_accuracy=val_accuracy,
            val_count=val_count,
            weights_sha256=sha256_of(weights),
        )
        _write_card(temporary, card)
    return card


def save_inception(
    folder: Path, weights: Path, *, resizers: list[Resizer], pinned: tuple[str, ...] = PINNED
) -> ExtractorCard:
    """Check a copy of Inception and put it into `folder`, which is replaced as a whole.

    Args:
        folder: for instance build/extractor.
        weights: `extractor.weights`: TorchScript or state dict.
        resizers: what scores are made with, the main one first.
        pinned: what the file may hash to; tests put stand-ins here.

    Raises:
        ValueError: the file is missing, is another file, or is not of Inception.
    """
    found = check_inception(weights, pinned=pinned)
    network = load_inception(weights, device=torch.device("cpu"))
    with replace_dir(folder) as temporary:
        shutil.copyfile(weights, temporary / WEIGHTS_NAME["inception"])
        card = ExtractorCard(
            kind="inception",
            name="inception-2015-12-05",
            resizers=resizers,
            num_features=network.num_features,
            num_classes=network.num_classes,
            image_size=None,
            width=None,
            val_accuracy=None,
            val_count=None,
            weights_sha256=found,
        )
        _write_card(temporary, card)
    return card


def load_extractor(folder: Path, *, device: torch.device) -> Extractor:
    """Load what `save_classifier` or `save_inception` wrote.

    Raises:
        ValueError: a file is missing, extractor.json is wrong, or the weights are not those that
            it describes.
    """
    card = read_extractor_card(folder)
    weights = folder / WEIGHTS_NAME[card.kind]
    if not weights.is_file() or sha256_of(weights) != card.weights_sha256:
        raise ValueError(
            f"{weights}: missing, or not the weights that extractor.json describes: "
            "run the stage extractor again"
        )
    if card.kind == "inception":
        return InceptionExtractor(load_inception(weights, device=device), card, device=device)

    from safetensors.torch import load_file

    assert card.width is not None, "the card of a classifier without its width"
    classifier = ResidualClassifier(width=card.width, num_classes=card.num_classes)
    classifier.load_state_dict(load_file(weights))
    return ClassifierExtractor(classifier, card, device=device)


def read_extractor_card(folder: Path) -> ExtractorCard:
    """Read extractor.json alone: what the extractor is, without its weights.

    Raises:
        ValueError: the file is missing or wrong.
    """
    return read_card(ExtractorCard, folder / CARD_NAME, stage="extractor")


def _write_card(folder: Path, card: ExtractorCard) -> None:
    with replace_file(folder / CARD_NAME) as path:
        path.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
