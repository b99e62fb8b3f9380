"""Extractors: the networks whose features and classes the scores are made of.

`classifier` is trained here on the data's labels, so that scores need no download; its scores are
named "FID (domain classifier)". `inception` is the network of published FIDs.

images (b 3 h w) uint8 -> [resizer] -> features (b d), logits (b classes), both float32
"""

import json
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from contradiff.atomic import replace_dir, replace_file, sha256_of
from contradiff.config import Section, parse_exactly
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.frechet import FeatureSource, FeatureStatistics

Kind = Literal["classifier", "inception"]
Images = UInt8[Tensor, "batch 3 height width"]
Outputs = tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]

WEIGHTS_NAME: dict[Kind, str] = {"classifier": "extractor.safetensors", "inception": "inception.pt"}
INCEPTION_SIDE = 299
INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Of the file at `INCEPTION_URL`: the digest that k-diffusion (crowsonkb) and others pin for it.

Not computed here, where there is no network."""


class ExtractorParams(Section):
    """Section `extractor`: the network that generated images are scored with."""

    kind: Kind
    weights: str | None = Field(description="inception: path of inception-2015-12-05.pt")
    width: int = Field(ge=2, multiple_of=2, description="classifier: its features are 2·width")
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    lr: float = Field(gt=0)

    @model_validator(mode="after")
    def _weights_belong_to_inception(self) -> "ExtractorParams":
        if self.kind == "classifier" and self.weights is not None:
            msg = (
                "extractor.weights is set, but extractor.kind classifier is trained here: "
                "set extractor.weights to null, or extractor.kind to inception"
            )
            raise ValueError(msg)
        if self.kind == "inception" and self.weights is None:
            raise ValueError(_no_weights("extractor.weights is null"))
        return self


class ScoreParams(Section):
    """Section `score`: how generated images are scored."""

    splits: int = Field(gt=0, description="of the inception score")
    batch_size: int = Field(gt=0)


class ExtractorCard(Section):
    """What extractor.json says beside the weights."""

    kind: Kind
    name: str
    resizer: str
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

    @property
    def name(self) -> str:
        """The name that its scores carry."""
        return self.card.name

    @property
    def resizer(self) -> str:
        """How images are brought to its input size."""
        return self.card.resizer

    @property
    def num_features(self) -> int:
        """Dimension of the features."""
        return self.card.num_features

    @abstractmethod
    def __call__(self, images: Images) -> Outputs:
        """Features and logits of images in RGB from 0 to 255, on the extractor's device."""


class ClassifierExtractor(Extractor):
    """The classifier trained here, on images of its own size only."""

    def __init__(
        self, classifier: ResidualClassifier, card: ExtractorCard, *, device: torch.device
    ) -> None:
        super().__init__(card)
        self._classifier = classifier.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Images) -> Outputs:
        """Features and logits.

        Raises:
            ValueError: the images have another size than the training images.
        """
        side = self.card.image_size
        if images.shape[2:] != (side, side):
            height, width = images.shape[2:]
            msg = (
                f"the extractor was trained on images of {side}x{side} pixels, not {height}x{width}"
                ": run the stage extractor again on the data that is scored"
            )
            raise ValueError(msg)
        return self._classifier(images.to(self._device))


class InceptionExtractor(Extractor):
    """Inception as in StyleGAN2-ADA and clean-fid: TorchScript made from the network of 2015.

    Images are resized as clean-fid's mode `clean` does, by antialiased bicubic interpolation in
    float without rounding, but in batches: torch's result differs from PIL's by less than 0.01 of
    255 grey levels. The logits leave out the last layer's bias, as the first implementation of the
    inception score does, and StyleGAN2-ADA after it.
    """

    def __init__(self, script: Any, card: ExtractorCard, *, device: torch.device) -> None:
        super().__init__(card)
        self._script = script.to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Images) -> Outputs:
        """Features of the last pooling, and logits without bias."""
        resized = resize_clean(images.to(self._device), side=INCEPTION_SIDE)
        pixels = ((resized - 128) / 128).contiguous(memory_format=torch.channels_last)
        # The script's own forward would resize in TensorFlow's old way, and run twice.
        features = self._script.layers(pixels).reshape(len(images), -1).float()
        return features, F.linear(features, self._script.output.weight.float())


def resize_clean(images: Images, *, side: int) -> Float[Tensor, "batch 3 side side"]:
    """clean-fid's resize of mode `clean`: antialiased bicubic in float, clipped to [0, 255]."""
    pixels = images.float()
    if pixels.shape[2:] != (side, side):
        pixels = F.interpolate(
            pixels, size=(side, side), mode="bicubic", align_corners=False, antialias=True
        )
    return pixels.clamp(0, 255)


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
            resizer="none",
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


def save_inception(folder: Path, weights: Path, *, sha256: str = INCEPTION_SHA256) -> ExtractorCard:
    """Check a copy of Inception and put it into `folder`, which is replaced as a whole.

    Args:
        folder: for instance build/extractor.
        weights: `extractor.weights`, an inception-2015-12-05.pt.
        sha256: what the file must hash to; tests put stand-ins here.

    Raises:
        ValueError: the file is missing, is another file, or is no Inception script.
    """
    if not weights.is_file():
        raise ValueError(_no_weights(f"extractor.weights: {weights} does not exist"))
    found = sha256_of(weights)
    if found != sha256:
        msg = (
            f"extractor.weights: {weights} is not the expected file: its sha256 is {found}, "
            f"expected {sha256}; the file usually comes from {INCEPTION_URL}"
        )
        raise ValueError(msg)
    script = _load_script(weights, torch.device("cpu"))
    num_classes, num_features = script.output.weight.shape
    with replace_dir(folder) as temporary:
        shutil.copyfile(weights, temporary / WEIGHTS_NAME["inception"])
        card = ExtractorCard(
            kind="inception",
            name="inception-2015-12-05",
            resizer="clean",
            num_features=num_features,
            num_classes=num_classes,
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
    card = read_card(folder)
    weights = folder / WEIGHTS_NAME[card.kind]
    if not weights.is_file() or sha256_of(weights) != card.weights_sha256:
        msg = (
            f"{weights}: missing, or not the weights that extractor.json describes: "
            "run the stage extractor again"
        )
        raise ValueError(msg)
    if card.kind == "inception":
        return InceptionExtractor(_load_script(weights, device), card, device=device)

    from safetensors.torch import load_file

    assert card.width is not None, "the card of a classifier without its width"
    classifier = ResidualClassifier(width=card.width, num_classes=card.num_classes)
    classifier.load_state_dict(load_file(weights))
    return ClassifierExtractor(classifier, card, device=device)


def read_card(folder: Path) -> ExtractorCard:
    """Read extractor.json alone: what the extractor is, without its weights.

    Raises:
        ValueError: the file is missing or wrong.
    """
    path = folder / "extractor.json"
    if not path.is_file():
        msg = f"{path}: no such file: run the stage extractor first"
        raise ValueError(msg)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        msg = f"{path}: not valid JSON: {error}"
        raise ValueError(msg) from error
    return parse_exactly(ExtractorCard, content, source=str(path))


def score_images(
    image_batches: Iterable[Images],
    extractor: Extractor,
    *,
    reference: str,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[FeatureStatistics, Float[Tensor, "n classes"]]:
    """Stream images through an extractor.

    Args:
        image_batches: uint8 batches; only one is held at a time.
        extractor: as from `load_extractor`.
        reference: what the images are, in words; it names them in the statistics.
        on_progress: called after each batch with the number of images done so far.

    Returns:
        Statistics of the features for `frechet_distance`, and the class probabilities of each image
        in order, float32 on the CPU, for `inception_score`.

    Raises:
        ValueError: there are no images.
    """
    source = FeatureSource(
        reference=reference,
        resizer=extractor.resizer,
        extractor=extractor.name,
        fingerprint=extractor.card.weights_sha256,
    )
    statistics = FeatureStatistics(extractor.num_features, source=source)
    probabilities: list[Tensor] = []
    for images in image_batches:
        features, logits = extractor(images)
        statistics.update(features)
        probabilities.append(logits.float().softmax(1).cpu())
        if on_progress is not None:
            on_progress(statistics.num_samples)
    if statistics.num_samples == 0:
        msg = f"no images to score in {reference}"
        raise ValueError(msg)
    return statistics, torch.cat(probabilities)


def _no_weights(fault: str) -> str:
    return (
        f"{fault}: extractor.kind inception needs the file inception-2015-12-05.pt. It usually "
        f"comes from {INCEPTION_URL} (91 MiB). No network is used here: fetch it yourself and set "
        "extractor.weights to its path, or set extractor.kind to classifier"
    )


def _write_card(folder: Path, card: ExtractorCard) -> None:
    with replace_file(folder / "extractor.json") as path:
        path.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _load_script(path: Path, device: torch.device) -> Any:
    """The TorchScript module in evaluation mode.

    Raises:
        ValueError: it is no TorchScript file, or has not the parts that Inception has.
    """
    try:
        with warnings.catch_warnings():
            # torch has no other reader for this file; that TorchScript is deprecated helps no user.
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*")
            script: Any = torch.jit.load(path, map_location=device)
    except RuntimeError as error:
        msg = f"extractor.weights: {path} is no TorchScript file: {error}"
        raise ValueError(msg) from error
    if not (hasattr(script, "layers") and hasattr(script, "output")):
        msg = f"extractor.weights: {path} has not Inception's parts `layers` and `output`"
        raise ValueError(msg)
    return script.eval().to(memory_format=torch.channels_last)
