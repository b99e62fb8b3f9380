"""Pooled features of any timm backbone (DINO, MAE, ...), tested by the same probe as ContraDiff."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from contradiff.features.batches import CleanBatch, StoredImages, central_crop, resized_batch
from contradiff.features.params import FeaturesParams, FeatureSpec
from contradiff.types import ByteImages


class TimmFeatures:
    """A timm backbone without classifier, with the backbone's own size, crop and normalisation."""

    def __init__(self, params: FeaturesParams, root: Path, device: torch.device) -> None:
        """Build the backbone that `params` names; features.timm_weights is relative to `root`.

        Raises ValueError if timm has no such model, or if the weights are missing or do not fit.
        """
        import timm
        from timm.data.config import resolve_model_data_config

        name, weights = params.timm_name or "", params.timm_weights
        if not timm.is_model(name):
            raise ValueError(f"features.timm_name: timm {timm.__version__} has no model {name!r}")
        try:
            model = timm.create_model(name, pretrained=weights is None, num_classes=0)
        except Exception as error:
            raise ValueError(
                f"features.timm_pretrained: {name} could not be built or downloaded ({error}); for "
                "local weights, set this to false and features.timm_weights to a .safetensors file"
            ) from error
        if weights is not None:
            load_weights(model, root / weights)
        config: dict[str, Any] = resolve_model_data_config(model)
        self.size: int = config["input_size"][-1]
        self.crop_fraction: float = config["crop_pct"]
        self.uncropped_size = round(self.size / self.crop_fraction)  # timm resizes, then crops
        self._mean = torch.tensor(config["mean"], device=device).view(3, 1, 1)
        self._std = torch.tensor(config["std"], device=device).view(3, 1, 1)
        self._model = model.requires_grad_(requires_grad=False).eval().to(device)
        self._is_bf16, self._device = params.precision == "bf16", device
        self.columns = (FeatureSpec(f"timm:{name}", None, None, "mean"),)

    def fingerprint(self) -> str:
        """Hash the names and values of all weights."""
        hasher = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            value = tensor.cpu().contiguous()
            hasher.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            hasher.update(value.reshape(-1).view(torch.uint8).numpy())
        return hasher.hexdigest()

    def read(self, images: StoredImages, split: str, number: int) -> Iterator[CleanBatch]:
        """Yield one shard's centre crops at the backbone's input size."""
        return images.pixel_batches(split, number, size=self.size, crop_fraction=self.crop_fraction)

    def show(self, images: ByteImages, labels: Int64[Tensor, " num_images"]) -> CleanBatch:
        """Make a batch of the images' centre crops at the backbone's input size."""
        crop = central_crop(*images.shape[2:], crop_fraction=self.crop_fraction)
        return resized_batch(images, labels, crop, size=self.size)

    @torch.inference_mode()
    def __call__(self, batch: CleanBatch) -> dict[str, Tensor]:
        """Compute the backbone's own pooled features (batch, width), float32."""
        pixels = (batch.pixels.to(self._device) + 1) / 2
        assert pixels.shape[2:] == (self.size, self.size), "`read` and `show` make this size"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16):
            features = self._model((pixels - self._mean) / self._std)
        return {self.columns[0].name: features.float()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load all weights except the classifier's. Raises ValueError if they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    key = f"features.timm_weights: {path}"
    if not path.is_file():
        raise ValueError(f"{key}: no such file")
    try:
        state = load_file(path)
    except SafetensorError as error:
        reason = f"is not a safetensors file ({error}); convert the weights to one"
        raise ValueError(f"{key}: {reason}") from error
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    prefixes = tuple(f"{name}." for name in names)
    try:
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith(prefixes)})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:200]
        raise ValueError(
            f"{key}: these weights do not fit the model features.timm_name: {reason}"
        ) from None
