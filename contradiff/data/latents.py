"""What is stored of an image beforehand: the moments of its crops, as the VAE gives them, 16 bits.

images, 3 x s x s in [-1, 1] => moments (mean, log-variance), 2c x s/f x s/f, and their crops
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from contradiff.base.vae import encode, scaling_factor
from contradiff.config import Section
from contradiff.data.shard_info import LatentInfo
from contradiff.data.shards import Record, Sample, array_from_bytes, array_to_bytes
from contradiff.data.transforms import (
    Crop,
    apply_crop,
    centre_crop,
    decode,
    jitter_colours,
    random_crop,
)
from contradiff.types import ByteImages, to_pixels

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


Dtype = Literal["float16", "bfloat16"]


class LatentsParams(Section):
    """Section `latents`: which crops of an image are encoded beforehand."""

    views: int = Field(
        ge=1, description="K: the centre crop, and K-1 random crops of training images"
    )
    flips: bool = Field(
        description="each view of a training image also mirrored, encoded from mirrored pixels"
    )
    crop_scale_min: float = Field(
        gt=0, le=1, description="a random crop covers this to 1 of the area"
    )
    colour_jitter: float = Field(
        ge=0, le=1, description="strength of SimCLR's colour distortion of the random crops"
    )
    dtype: Dtype = Field(description="in which moments are stored; the VAE runs in float32")
    min_psnr: float = Field(
        description="decoded latents must show their images this well, on average, in dB"
    )
    batch_size: int = Field(ge=1, description="crops encoded at once")


@dataclass(frozen=True)
class StoredLatents:
    """One image's views: moments and the crops they show. View 0 is the centre crop.

    If there are flips, the mirror images of all views stand behind them, in the same order. The
    moments are float16, or bfloat16's values as float32, since NumPy has no bfloat16.
    """

    key: str
    moments: Float[np.ndarray, "views moments h w"]
    crops: tuple[Crop, ...]

    def to_record(self) -> Record:
        """As one WebDataset sample: `moments.npy` and `crops.npy` (int32).

        The moments are float16, or uint16: bfloat16's bits, which are the upper half of float32's.
        """
        moments = self.moments
        if moments.dtype == np.float32:
            moments = (moments.view(np.uint32) >> 16).astype(np.uint16)
        return {
            "__key__": self.key.encode(),
            "moments.npy": array_to_bytes(moments),
            "crops.npy": array_to_bytes(np.stack([crop.to_array() for crop in self.crops])),
        }

    @classmethod
    def of_record(cls, record: Mapping[str, bytes]) -> "StoredLatents":
        """Inverse of `to_record`."""
        moments = array_from_bytes(record["moments.npy"])
        if moments.dtype == np.uint16:
            moments = (moments.astype(np.uint32) << 16).view(np.float32)
        crops = array_from_bytes(record["crops.npy"])
        return cls(
            record["__key__"].decode(), moments, tuple(Crop.from_array(crop) for crop in crops)
        )


def choose_crops(
    image: Tensor, *, key: str, views: int, crop_scale_min: float, seed: int
) -> list[Crop]:
    """The centre crop and `views - 1` random crops, which depend on the seed and the key alone."""
    height, width = image.shape[1:]
    rng = np.random.default_rng([seed, crc32(key.encode())])
    crops = [random_crop(rng, height, width, scale_min=crop_scale_min) for _ in range(views - 1)]
    return [centre_crop(height, width), *crops]


@dataclass(frozen=True)
class Views:
    """The crops of some images, cut out: what is encoded at once."""

    keys: tuple[str, ...]
    crops: tuple[tuple[Crop, ...], ...]
    images: ByteImages


def cut_views(
    samples: Sequence[Sample],
    *,
    params: LatentsParams,
    views: int,
    flips: bool,
    image_size: int,
    seed: int,
) -> Views:
    """Decode images and cut their crops out; the result depends on each sample and the seed alone.

    Args:
        samples: encoded images.
        params: how crops are distorted.
        views: crops an image.
        flips: whether each crop is followed, behind all of the image's, by its mirror image.
        image_size: side of the crops, in pixels.
        seed: of the random crops and colours.

    Raises:
        ValueError: an image cannot be decoded.
    """
    crops: list[tuple[Crop, ...]] = []
    images: list[Tensor] = []
    for item in samples:
        image = decode(item.image, name=item.key)
        chosen = choose_crops(
            image, key=item.key, views=views, crop_scale_min=params.crop_scale_min, seed=seed
        )
        cuts: list[Tensor] = []
        for view, crop in enumerate(chosen):
            cut = apply_crop(image, crop, size=image_size)
            rng = np.random.default_rng([seed, crc32(item.key.encode()), view])
            strength = params.colour_jitter if view > 0 else 0.0
            cuts.append(jitter_colours(cut, rng, strength=strength))
        if flips:
            chosen += [replace(crop, mirrored=not crop.mirrored) for crop in chosen]
            cuts += [cut.flip(-1) for cut in cuts]
        crops.append(tuple(chosen))
        images += cuts
    return Views(tuple(item.key for item in samples), tuple(crops), torch.stack(images))


def encode_views(
    vae: "AutoencoderKL", views: Views, *, dtype: Dtype, device: torch.device
) -> list[StoredLatents]:
    """Encode what `cut_views` cut out.

    Args:
        vae: frozen, float32, on `device`.
        views: of one or more images.
        dtype: to which the moments are rounded.
        device: where the VAE runs.
    """
    moments = encode(vae, to_pixels(views.images.to(device))).cpu()
    rounded = moments.half() if dtype == "float16" else moments.bfloat16().float()
    by_image = rounded.unflatten(0, (len(views.keys), -1)).numpy()
    return [
        StoredLatents(key, of_image, crops)
        for key, of_image, crops in zip(views.keys, by_image, views.crops, strict=True)
    ]


def split_samples(
    samples: Iterable[Sample], *, params: LatentsParams, views: int, flips: bool
) -> Iterator[list[Sample]]:
    """Yield the images whose crops are encoded together; the last ones when `samples` has ended."""
    size = max(1, params.batch_size // (views * (1 + flips)))
    chunk: list[Sample] = []
    for sample in samples:
        if len(chunk) == size:
            yield chunk
            chunk = []
        chunk.append(sample)
    if chunk:
        yield chunk


def latent_info(vae: "AutoencoderKL", *, params: LatentsParams, image_size: int) -> LatentInfo:
    """What a reader of the shards must know: kept in their index."""
    return LatentInfo(
        dtype=params.dtype,
        scaling_factor=scaling_factor(vae),
        image_size=image_size,
        views=params.views,
        flips=params.flips,
        crop_scale_min=params.crop_scale_min,
        colour_jitter=params.colour_jitter,
    )
