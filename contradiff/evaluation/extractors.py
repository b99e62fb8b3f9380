"""Extractors: the networks whose features and logits the scores use.

The `classifier` is trained here, so it needs no download. `inception` is the network with which
published FIDs are computed.

images => prepared images (b 3 h w) => features (b d), logits (b classes)
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Num, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from contradiff.config import Section, read_card
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.inception import Inception
from contradiff.evaluation.inception_files import INCEPTION_URL, PINNED, STATE_DICT_URL, no_weights
from contradiff.evaluation.params import Kind, Resizer
from contradiff.files import explain_damage, load_tensors, replace_dir, sha256_of
from contradiff.imports import slow_import

Image = UInt8[Tensor, "3 height width"]

CARD_NAME, CLASSIFIER_NAME = "extractor.json", "extractor.safetensors"


class ExtractorCard(Section):
    """Content of extractor.json, stored with the weights. For Inception, some keys are null."""

    kind: Kind
    name: str
    resizers: list[Resizer] = Field(min_length=1)
    num_features: int = Field(gt=0)
    num_classes: int = Field(gt=0)
    image_size: int | None = None
    width: int | None = None
    val_accuracy: float | None = Field(default=None, ge=0, le=1, description="top-1 accuracy")
    val_count: int | None = Field(default=None, description="images that gave val_accuracy")
    val_chance: float | None = Field(
        default=None, description="accuracy of always answering with their most frequent class"
    )
    weights_sha256: str

    @model_validator(mode="after")
    def _a_classifier_states_all(self) -> "ExtractorCard":
        keys = "width", "image_size", "val_accuracy", "val_count", "val_chance"
        missing = [key for key in keys if getattr(self, key) is None]
        if self.kind == "classifier" and missing:
            raise ValueError(f"a classifier's card must state {', '.join(missing)}")
        return self

    @property
    def weakness(self) -> str | None:
        """Why no score may use this network: a classifier near chance. None if scores may use it.

        Features of a network that has learned nothing hardly depend on the image. All sets of
        images then look alike, which gives splendid scores. The lower end of the accuracy's 95%
        interval (Wilson, 1927) must exceed twice the chance, or, if the chance is above a third,
        the middle between the chance and 1.
        """
        with slow_import():
            from scipy.stats import binomtest

        if self.val_accuracy is None or self.val_count is None or self.val_chance is None:
            assert self.kind == "inception", "save_classifier states the accuracy and the chance"
            return None
        num_correct, chance = round(self.val_accuracy * self.val_count), self.val_chance
        low = float(binomtest(num_correct, self.val_count).proportion_ci(method="wilson").low)
        needed = min(2 * chance, (1 + chance) / 2)
        if low > needed:
            return None
        return (
            f"the classifier is right on {self.val_accuracy:.1%} of {self.val_count:,} validation "
            f"images (95% interval from {low:.1%}), and the most frequent class is right on "
            f"{chance:.1%}. Scores need an interval above {needed:.1%}, because a classifier near "
            "chance rates all images alike. Raise extractor.epochs or add training images"
        )


class Extractor:
    """A frozen network that computes features and logits. `load_extractor` loads one."""

    def __init__(
        self, network: ResidualClassifier | Inception, card: ExtractorCard, *, device: torch.device
    ) -> None:
        from cleanfid.resize import build_resizer

        self.card, self._device = card, device
        self._network = network.to(device).eval()
        names = [name for name in card.resizers if name != "none"]
        with warnings.catch_warnings():  # without this, clean-fid would silence later warnings
            # clean-fid's functions map (h w 3) uint8 to (299 299 3) float32. For legacy_tensorflow,
            # the function changes nothing, and the network itself resizes.
            self._resize = {name: build_resizer(name) for name in names}

    def prepare(self, image: Image, *, resizer: Resizer) -> Num[Tensor, "3 height2 width2"]:
        """Resize an image (RGB, 0 to 255) on the CPU to the size that the network needs.

        Raises ValueError if the classifier was trained on images of another size.
        """
        if resizer != "none":
            resized = self._resize[resizer](image.permute(1, 2, 0).numpy())
            return torch.from_numpy(resized).permute(2, 0, 1)
        side, (height, width) = self.card.image_size, image.shape[1:]
        if (height, width) != (side, side):
            raise ValueError(
                f"the extractor was trained on images of {side}x{side} pixels, not {height}x{width}"
                "; run the stage `extractor` again on the data that you score"
            )
        return image

    @torch.inference_mode()
    def __call__(
        self, images: Num[Tensor, "batch 3 height2 width2"], *, resizer: Resizer
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Return features and logits (float32, on the extractor's device) of prepared images."""
        images = images.to(self._device)
        if isinstance(self._network, Inception):
            return self._network(images, resizer=resizer)
        return self._network(images)


def save_classifier(
    folder: Path,
    classifier: ResidualClassifier,
    *,
    image_size: int,
    val_accuracy: float,
    val_count: int,
    val_chance: float,
) -> None:
    """Replace `folder` by a trained classifier and its extractor.json."""
    from safetensors.torch import save_file

    state = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    with replace_dir(folder) as temporary:
        save_file(state, weights := temporary / CLASSIFIER_NAME)
        names = "num_features", "num_classes", "width"
        facts: dict[str, Any] = {name: getattr(classifier, name) for name in names}
        facts |= {"kind": "classifier", "name": "domain-classifier", "resizers": ["none"]}
        facts |= {"val_accuracy": val_accuracy, "val_count": val_count, "val_chance": val_chance}
        facts |= {"image_size": image_size}
        card = ExtractorCard(weights_sha256=sha256_of(weights), **facts)
        (temporary / CARD_NAME).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def save_inception(folder: Path, weights: Path, *, resizers: list[Resizer]) -> None:
    """Replace `folder` by a checked copy of Inception's weights and an extractor.json.

    Raises ValueError if the file is missing, or if its sha256 is not in `PINNED`.
    """
    if not weights.is_file():
        raise ValueError(no_weights(f"extractor.weights: {weights} does not exist"))
    found = sha256_of(weights)
    if found not in PINNED:
        raise ValueError(
            f"extractor.weights: {weights} is not the expected file: its sha256 is {found}, not "
            f"{' or '.join(PINNED)}; get the file from {INCEPTION_URL} or "
            f"{STATE_DICT_URL}"
        )
    with replace_dir(folder) as temporary:
        network = Inception(Path(shutil.copyfile(weights, temporary / PINNED[found])))
        facts: dict[str, Any] = {"kind": "inception", "name": "inception-2015-12-05"}
        facts |= {"num_features": network.num_features, "num_classes": network.num_classes}
        card = ExtractorCard(resizers=resizers, weights_sha256=found, **facts)
        (temporary / CARD_NAME).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_extractor_card(folder: Path) -> ExtractorCard:
    """Read extractor.json, but no weights; raise ValueError if it is missing or malformed."""
    return read_card(ExtractorCard, folder / CARD_NAME, stage="extractor")


def load_extractor(folder: Path, *, device: torch.device) -> Extractor:
    """Load a saved extractor; raise ValueError if its weights or extractor.json are wrong."""
    card = read_extractor_card(folder)
    names = [CLASSIFIER_NAME] if card.kind == "classifier" else list(PINNED.values())
    path = next((path for name in names if (path := folder / name).is_file()), folder / names[0])
    remedy = f"run `dvc repro extractor`, or fetch it with `dvc pull {folder}`"
    if card.kind == "inception":
        with explain_damage(path, remedy=remedy):
            found = sha256_of(path)
            if found != card.weights_sha256 or found not in PINNED:
                raise ValueError(f"its sha256 is {found}, which is not the expected one")
            return Extractor(Inception(path), card, device=device)
    weights = load_tensors(path, sha256=card.weights_sha256, remedy=remedy)
    with explain_damage(path, remedy=remedy):
        classifier = ResidualClassifier(width=card.width or 0, num_classes=card.num_classes)
        classifier.load_state_dict(weights)
    return Extractor(classifier, card, device=device)
