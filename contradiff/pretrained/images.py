"""The images that users give: files, PIL images, arrays or tensors => batches for the model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from contradiff.base.vae import encode, mode, scaling_factor
from contradiff.data.decoding import decode_rgb, upright_rgb
from contradiff.data.transforms import apply_crop, centre_crop
from contradiff.features.batches import CleanBatch, resized_batch

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""The path of a file, a PIL image of any mode, an array of uint8 (height, width[, channels]), or a
tensor of uint8 (channels, height, width)."""
Images: TypeAlias = ImageLike | Sequence[ImageLike]


def as_list(images: Any) -> list[Any]:
    """Return a list of images. A batch (4 axes) gives its images, a single image a list of one."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim > 1:
        return list(images if images.ndim == 4 else images[None])
    return [images] if isinstance(images, str | Path | Image.Image | int) else list(images)


def name_of(image: ImageLike, index: int) -> str:
    """Return the path of an image, or "image 3" if it has no path."""
    if isinstance(image, str | Path):
        return str(image)
    return str(getattr(image, "filename", "") or f"image {index}")


def square(image: ImageLike, *, size: int, name: str) -> UInt8[Tensor, "3 size size"]:
    """Resize the central square of an image to `size` pixels, as the pipeline does.

    Raises ValueError, with `name`, if the image is missing, damaged or not of uint8.
    """
    try:
        if isinstance(image, str | Path):
            decoded = decode_rgb(Path(image).read_bytes(), name=name)
        else:
            decoded = upright_rgb(image if isinstance(image, Image.Image) else _opened(image, name))
    except OSError as error:
        raise ValueError(f"{name}: the image cannot be read ({error})") from error
    pixels = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)
    return apply_crop(pixels, centre_crop(*pixels.shape[1:]), size=size)


def to_pil(pixels: UInt8[Tensor, "3 height width"]) -> Image.Image:
    """Return an image of uint8 in Pillow's form."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


@torch.inference_mode()
def clean_batch(
    vae: "AutoencoderKL",
    images: Sequence[ImageLike],
    names: Sequence[str],
    *,
    size: int,
    dtype: str,
) -> CleanBatch:
    """Make a batch as the pipeline does: latents are rounded to `dtype`, in which it stores them.

    Raises ValueError if an image cannot be read.
    """
    pairs = zip(images, names, strict=True)
    cut = torch.stack([square(image, size=size, name=name) for image, name in pairs])
    no_labels = torch.zeros(len(images), dtype=torch.int64)
    batch = resized_batch(cut, no_labels, centre_crop(size, size), size=size)
    moments = encode(vae, batch.pixels.to(vae.device)).to(getattr(torch, dtype))
    latents = mode(moments, scaling_factor=scaling_factor(vae)).cpu()
    return replace(batch, latents=latents, keys=tuple(names))


def _opened(image: np.ndarray | Tensor, name: str) -> Image.Image:
    form = f"{image.dtype} with the shape {tuple(image.shape)}"
    if isinstance(image, Tensor) and image.ndim == 3:
        image = image.permute(1, 2, 0).cpu()
    array = np.asarray(image)
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    if array.dtype != np.uint8 or array.ndim < 2 or array.shape[2:] not in ((), (3,), (4,)):
        wanted = "uint8 (0 to 255) with 1, 3 or 4 channels: first in a tensor, last in an array"
        raise ValueError(f"{name}: {form} is no image; give {wanted}")
    return Image.fromarray(array)
