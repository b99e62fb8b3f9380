"""Pooled features of any timm backbone (DINO, MAE, ...), for the same probe as ours."""

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from contradiff.data.map_ahead import map_ahead
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import Sample, ShardIndex, image_of, read_shard
from contradiff.data.transforms import Crop, apply_crop, centre_crop, decode
from contradiff.features.cache import Column
from contradiff.features.extraction import LOOKAHEAD, CleanBatch, FeatureData, autocast
from contradiff.types import ByteImages, to_pixels


class TimmFeatures:
    """A timm backbone without its classifier, and its own input size, crop, mean and deviation."""

    def __init__(
        self,
        name: str,
        *,
        weights: Path | None,
        precision: str,
        device: torch.device,
    ) -> None:
        """Build the backbone.

        Args:
            name: timm's name of the architecture, with its tag where weights are fetched.
            weights: a .safetensors file; None: fetch them from the hub.
            precision: fp32, or bf16 by autocast.
            device: where to compute.

        Raises:
            ValueError: timm knows no such model, or the weights cannot be had or do not fit.
        """
        import timm
        from timm.data.config import resolve_model_data_config

        if not timm.is_model(name):
            raise ValueError(f"features.timm_name: timm {timm.__version__} knows no {name!r}")
        try:
            model = timm.create_model(name, pretrained=weights is None, num_classes=0)
        except Exception as error:
            raise ValueError(
                f"features.timm_pretrained: {name} could not be made or fetched ({error}); without "
                "a network set features.timm_weights to a local .safetensors file"
            ) from error
        if weights is not None:
            load_weights(model, weights)
        config: dict[str, Any] = resolve_model_data_config(model)
        self.size: int = config["input_size"][-1]
        self.crop_fraction: float = config["crop_pct"]
        # timm resizes to this, then crops
        self.uncropped_size = round(self.size / self.crop_fraction)
        self._mean = torch.tensor(config["mean"], device=device).view(3, 1, 1)
        self._std = torch.tensor(config["std"], device=device).view(3, 1, 1)
        self._model = model.requires_grad_(requires_grad=False).eval().to(device)
        self._precision, self._device = precision, device
        self.columns = (Column(f"timm:{name}", None, None, "mean"),)

    def fingerprint(self) -> str:
        """SHA-256 over the names and values of all weights, wherever they came from."""
        hasher = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            value = tensor.cpu().contiguous()
            hasher.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            hasher.update(value.reshape(-1).view(torch.uint8).numpy())
        return hasher.hexdigest()

    def read(self, data: FeatureData, split: str, number: int) -> Iterator[CleanBatch]:
        """Pixels of one image shard at the backbone's size."""
        return image_batches(data, split, number, size=self.size, crop_fraction=self.crop_fraction)

    def show(
        self, images: ByteImages, labels: Int64[Tensor, " num_images"]
    ) -> Iterator[CleanBatch]:
        """One batch of images that are in memory: the centre, at the backbone's size."""
        crop = centre_share(*images.shape[2:], crop_fraction=self.crop_fraction)
        pixels = torch.stack([apply_crop(image, crop, size=self.size) for image in images])
        indices = tuple(range(len(images)))
        empty = torch.empty(len(images), 1, 0, 0)
        yield CleanBatch(indices, empty, to_pixels(pixels), labels, tuple(map(str, indices)))

    @torch.inference_mode()
    def __call__(self, batch: CleanBatch) -> dict[str, Tensor]:
        """The backbone's pooled features of a batch's pixels."""
        pixels = (batch.pixels.to(self._device) + 1) / 2
        if pixels.shape[2:] != (self.size, self.size):
            size = (self.size, self.size)
            pixels = F.interpolate(
                pixels, size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        with autocast(self._device, self._precision):
            features = self._model((pixels - self._mean) / self._std)
        return {self.columns[0].name: features.float()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a backbone's weights; a classifier in the file is left out.

    Raises:
        ValueError: the file is missing, is no safetensors file, or does not fit; names the key.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    key = f"features.timm_weights: {path}"
    if not path.is_file():
        raise ValueError(f"{key}: no such file")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{key}: no safetensors file ({error}); pickled weights are not read"
        ) from error
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = {
        name: tensor
        for name, tensor in state.items()
        if not any(name.startswith(f"{part}.") for part in names)
    }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{key}: does not fit the architecture: {str(error).splitlines()[1].strip()[:200]}"
        ) from None


def centre_share(height: int, width: int, *, crop_fraction: float) -> Crop:
    """The square in the middle whose side is `crop_fraction` of the shorter one."""
    whole = centre_crop(height, width)
    side = max(1, round(whole.height * crop_fraction))
    offset = (whole.height - side) // 2
    return Crop(whole.top + offset, whole.left + offset, side, side, mirrored=False)


def centre_pixels(sample: Sample, *, size: int, crop_fraction: float) -> tuple[str, int, Tensor]:
    """Key, label, and the centre of an image at `size`, uint8.

    A crop of `crop_fraction` of the shorter side, then one resize: where timm resizes to
    size / crop_fraction first and crops then. *Deviation*: always antialiased bicubic.
    """
    image = decode(sample.image, name=sample.key)
    crop = centre_share(*image.shape[1:], crop_fraction=crop_fraction)
    return sample.key, sample.label, apply_crop(image, crop, size=size)


def image_batches(
    data: FeatureData, split: str, number: int, *, size: int, crop_fraction: float
) -> Iterator[CleanBatch]:
    """Yield one image shard's pixels at a backbone's size, in order; latents are left empty.

    Args:
        data: where the shards are.
        split: of the data.
        number: of the shard.
        size: side of the pixels.
        crop_fraction: share of the shorter side that is seen.
    """
    shards = ShardIndex.read(data.images, ImageInfo).shards(split)
    first_index = sum(shard.num_samples for shard in shards[:number])
    samples = map(image_of, read_shard(data.images / shards[number].name, shards[number]))
    make = partial(centre_pixels, size=size, crop_fraction=crop_fraction)
    num_ahead = LOOKAHEAD * data.batch_size
    rows = map_ahead(make, samples, num_threads=data.num_threads, num_ahead=num_ahead)
    while chunk := list(islice(rows, data.batch_size)):
        keys, labels, pixels = zip(*chunk, strict=True)
        empty = torch.empty(len(chunk), 1, 0, 0)
        shown = to_pixels(torch.stack(pixels))
        indices = tuple(range(first_index, first_index + len(chunk)))
        yield CleanBatch(indices, empty, shown, torch.tensor(labels), tuple(keys))
        first_index += len(chunk)
