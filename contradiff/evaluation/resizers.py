"""How images come to Inception's input: three ways that are in use, each with its own scaling.

A resizer is part of a score: the same images differ by whole points of FID between them (Parmar et
al., 2022). All work on batches, on the images' device, without rounding to bytes in between.

images (b 3 h w) uint8 -> network input (b 3 299 299) float32, about [-1, 1]
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Images = UInt8[Tensor, "batch 3 height width"]
Resized = Float[Tensor, "batch 3 side side"]
Resizer = Literal["none", "clean", "legacy_tensorflow", "legacy_pytorch"]

INCEPTION_SIDE = 299


def resize_clean(images: Images, *, side: int) -> Resized:
    """clean-fid's mode `clean`: antialiased bicubic in float, clipped to [0, 255].

    Differs from PIL's, which clean-fid calls channel by channel, by less than 0.01 of 255 levels.
    """
    pixels = images.float()
    if pixels.shape[2:] != (side, side):
        pixels = F.interpolate(
            pixels, size=(side, side), mode="bicubic", align_corners=False, antialias=True
        )
    return pixels.clamp(0, 255)


def resize_tensorflow(images: Images, *, side: int) -> Resized:
    """TensorFlow 1's `resize_bilinear`, inside the first FID's graph: no antialiasing, and shifted.

    Output pixel i reads the input at i * in / out, without the half pixel of today's resizers
    (tensorflow#6720). torch-fidelity and StyleGAN's TorchScript network do the same.
    """
    pixels = images.float()
    height, width = pixels.shape[2:]
    low, high, weight = _tensorflow_grid(height, side, device=pixels.device)
    rows = torch.lerp(pixels[:, :, low], pixels[:, :, high], weight[:, None])
    low, high, weight = _tensorflow_grid(width, side, device=pixels.device)
    return torch.lerp(rows[..., low], rows[..., high], weight)


def _tensorflow_grid(
    size: int, side: int, *, device: torch.device
) -> tuple[Int64[Tensor, " side"], Int64[Tensor, " side"], Float[Tensor, " side"]]:
    source = torch.arange(side, dtype=torch.float32, device=device) * (size / side)
    low = source.long()
    return low, (low + 1).clamp(max=size - 1), source - low


def resize_pytorch(images: Images, *, side: int) -> Resized:
    """pytorch-fid's: bilinear with half-pixel centres, and no antialiasing."""
    pixels = images.float()
    if pixels.shape[2:] == (side, side):
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)


def _like_tensorflow(pixels: Resized) -> Resized:
    return (pixels - 128) / 128


def _like_pytorch(pixels: Resized) -> Resized:
    return pixels / 127.5 - 1


_INPUTS: dict[Resizer, tuple[Callable[..., Resized], Callable[[Resized], Resized]]] = {
    "clean": (resize_clean, _like_tensorflow),
    "legacy_tensorflow": (resize_tensorflow, _like_tensorflow),
    "legacy_pytorch": (resize_pytorch, _like_pytorch),
}


def inception_input(
    images: Images, *, resizer: Resizer, side: int = INCEPTION_SIDE
) -> Float[Tensor, "batch 3 side side"]:
    """Resize and scale images for Inception, as the library does that `resizer` is named after.

    Args:
        images: RGB from 0 to 255.
        resizer: clean (clean-fid), legacy_tensorflow (torch-fidelity, StyleGAN, the first FID) or
            legacy_pytorch (pytorch-fid, whose scaling differs too).
        side: of the result, in pixels.

    Raises:
        ValueError: Inception has no such resizer.
    """
    if resizer not in _INPUTS:
        raise ValueError(
            f"extractor.resizers: {resizer} is none of Inception's: {', '.join(_INPUTS)}"
        )
    resize, scale = _INPUTS[resizer]
    return scale(resize(images, side=side))
