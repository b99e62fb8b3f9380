"""Decode images and cut out crops. A `Crop` says which rectangle of the image is cut out."""

import math
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from contradiff.data.decoding import decode_rgb

ASPECT_RATIOS = (3 / 4, 4 / 3)
"""Range of width / height of random crops, as in torchvision's RandomResizedCrop and SimCLR."""


@dataclass(frozen=True)
class Crop:
    """A rectangle in an image, in pixels, and whether the crop is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    def to_array(self) -> Int[np.ndarray, "5"]:
        """Return the crop as five integers, for storage."""
        return np.asarray(astuple(self), dtype=np.int32)

    @classmethod
    def from_array(cls, values: Int[np.ndarray, "5"]) -> "Crop":
        """Return the crop that the five integers from `to_array` describe."""
        top, left, height, width, mirrored = (int(value) for value in values)
        return cls(top, left, height, width, bool(mirrored))


def decode(encoded: bytes, *, name: str) -> UInt8[Tensor, "3 height width"]:
    """Decode an image to upright RGB, as `decode_rgb` does."""
    pixels = np.array(decode_rgb(encoded, name=name))
    # The memory stays channels-last, which makes resizing faster and does not change its result.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def centre_crop(height: int, width: int) -> Crop:
    """Return the largest centred square (resized: torchvision's Resize, then CenterCrop)."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side, mirrored=False)


def random_crop(rng: np.random.Generator, height: int, width: int, *, scale_min: float) -> Crop:
    """Draw a random crop, as SimCLR does. The crop is mirrored with probability 1/2.

    The crop's share of the area is uniform in [`scale_min`, 1]. Its aspect ratio is log-uniform in
    [3/4, 4/3]. If ten drawn crops do not fit, the result is the centre crop.
    """
    mirrored = bool(rng.random() < 0.5)
    for _ in range(10):
        area = height * width * rng.uniform(scale_min, 1.0)
        ratio = math.exp(rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width, mirrored)
    return replace(centre_crop(height, width), mirrored=mirrored)


def apply_crop(
    image: UInt8[Tensor, "3 height width"], crop: Crop, *, size: int
) -> UInt8[Tensor, "3 size size"]:
    """Cut out a crop, resize it to size x size (antialiased bicubic), and mirror it if needed."""
    cut = image[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if cut.shape[1:] != (size, size):
        from torchvision.transforms.v2 import functional as transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        cut = transforms.resize(cut, [size, size], interpolation=bicubic, antialias=True)
    return cut.flip(-1) if crop.mirrored else cut.contiguous()


def jitter_colours(
    image: UInt8[Tensor, "3 height width"], rng: np.random.Generator, *, strength: float
) -> UInt8[Tensor, "3 height width"]:
    """Apply SimCLR's colour distortion: change brightness, contrast, saturation and hue.

    `strength` is SimCLR's s. Brightness, contrast and saturation get factors in 1 ± 0.8 s. The hue
    turns by up to ± 0.2 s of a circle. One image in five becomes grey. With s = 0, nothing changes.
    """
    if strength == 0:
        return image
    from torchvision.transforms.v2 import functional as transforms

    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    image = transforms.adjust_brightness(image, rng.uniform(low, high))
    image = transforms.adjust_contrast(image, rng.uniform(low, high))
    image = transforms.adjust_saturation(image, rng.uniform(low, high))
    image = transforms.adjust_hue(image, rng.uniform(-0.2, 0.2) * strength)
    return transforms.rgb_to_grayscale(image, 3) if rng.random() < 0.2 else image
