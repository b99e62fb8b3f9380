"""Encode images as latents, and check how well the latents reproduce the images.

Worker processes may decode and crop the images. The main process encodes the crops with the VAE.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from contradiff.base import vae
from contradiff.data import transforms
from contradiff.data.latents import StoredLatents
from contradiff.data.params import LatentsParams
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Record, Sample, ShardIndex
from contradiff.data.transforms import Crop
from contradiff.files import describe_bytes
from contradiff.types import ByteImages, to_pixels

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

_TAR_BLOCK, _TAR_RECORD, _NPY_HEADER = 512, 10240, 128


@dataclass(frozen=True)
class CutImages:
    """The crops of several images, image after image. The VAE encodes all crops in one pass."""

    keys: tuple[str, ...]
    crops: tuple[tuple[Crop, ...], ...]
    pixels: ByteImages


@dataclass(frozen=True)
class LatentEncoder:
    """Encodes crops of images. Latents depend only on the image, the image's key and the seed.

    The VAE is frozen and in float32. `image_size` is the side of the crops in pixels.
    """

    vae: "AutoencoderKL"
    params: LatentsParams
    image_size: int
    seed: int

    @property
    def info(self) -> LatentInfo:
        """Return facts about the latents, which the index of the latent shards stores."""
        return LatentInfo(
            scaling_factor=vae.scaling_factor(self.vae),
            image_size=self.image_size,
            **self.params.model_dump(exclude={"min_psnr", "batch_size"}),
        )

    def encode(
        self, samples: Iterable[Sample], *, split: str, num_workers: int = 0
    ) -> Iterator[StoredLatents]:
        """Encode images in order. The split decides how many crops an image has.

        If `num_workers` > 0, that many worker processes decode and crop the images. Raises
        ValueError if an image cannot be decoded.
        """
        views, flips = self.params.views_of(split)
        samples, size = iter(samples), max(1, self.params.batch_size // (views * (1 + flips)))
        # The sampler yields lists of images, not indices. The loader sends the lists to workers.
        loader = DataLoader(
            _Cutter(self.params, views, flips, self.image_size, self.seed),
            sampler=iter(lambda: list(islice(samples, size)), []),
            batch_size=None,
            num_workers=num_workers,
        )
        for cut in loader:
            if isinstance(cut, ValueError):
                raise cut
            yield from self.encode_cut(cut)

    def encode_cut(self, cut: CutImages) -> Iterator[StoredLatents]:
        """Encode crops in one pass of the VAE, and round the result to 16 bits.

        Raises ValueError if a latent is not finite.
        """
        moments = vae.encode(self.vae, to_pixels(cut.pixels.to(self.vae.device))).cpu()
        rounded = moments.half() if self.params.dtype == "float16" else moments.bfloat16().float()
        rounded = rounded.unflatten(0, (len(cut.keys), -1))
        is_finite = rounded.isfinite().flatten(1).all(1).tolist()
        if not all(is_finite):
            why = "base.path: the VAE's weights are broken"
            if bool(moments.isfinite().all()):
                why = "latents.dtype: the values exceed float16; set latents.dtype to bfloat16"
            key = cut.keys[is_finite.index(False)]
            raise ValueError(f"{why} (the latents of image {key} are NaN or infinite)")
        by_image = rounded.numpy()
        return map(StoredLatents, cut.keys, by_image, cut.crops)

    def shard_bytes(self, split: str, num_samples: int) -> int:
        """Return the size of a latent shard in bytes, without compression."""
        views, flips = self.params.views_of(split)
        side = self.image_size // vae.downsampling_factor(self.vae)
        moments = 2 * self.vae.config["latent_channels"] * side**2
        members = [views * (1 + flips) * num_bytes for num_bytes in (2 * moments, 5 * 4)]
        sample = sum(_TAR_BLOCK + _round_up(_NPY_HEADER + m, _TAR_BLOCK) for m in members)
        return _round_up(num_samples * sample + 2 * _TAR_BLOCK, _TAR_RECORD)

    def describe_size(self, index: ShardIndex[ImageInfo]) -> str:
        """Return a line for the log: the disk space of the latents, in total and by split."""
        total, lines = 0, list[str]()
        for split, shards in index.splits.items():
            views, flips = self.params.views_of(split)
            shown = f"{views} view{'s' if views > 1 else ''}{' and their mirror images' * flips}"
            size = sum(self.shard_bytes(split, shard.num_samples) for shard in shards)
            total, images = total + size, f"{index.num_samples(split):,} images"
            lines.append(f"{split} {describe_bytes(size)} ({images} x {shown})")
        return f"{describe_bytes(total)} of latents: {', '.join(lines)}"


@dataclass(frozen=True)
class Reconstruction:
    """Centre crops, and the same crops decoded from their latents.

    `psnr` is the mean over the images, in dB. `std` is the standard deviation of the scaled
    latents; it should be about 1.
    """

    originals: ByteImages
    decoded: ByteImages
    psnr: float
    std: float


def reconstruct(
    encoder: LatentEncoder, images: Iterable[Sample], records: Iterable[Record]
) -> Reconstruction:
    """Decode the stored latents of centre crops, and compare the result with the images.

    Raises ValueError if the mean PSNR is below latents.min_psnr.
    """
    info, stored = encoder.info, [StoredLatents.of_record(record) for record in records]
    originals = list[Tensor]()
    for image, item in zip(images, stored, strict=True):
        pixels = transforms.decode(image.image, name=image.key)
        originals.append(transforms.apply_crop(pixels, item.crops[0], size=info.image_size))
    moments = (torch.from_numpy(item.moments[:1]).to(encoder.vae.device) for item in stored)
    latents = [vae.mode(item, scaling_factor=info.scaling_factor) for item in moments]
    decode = partial(vae.decode_latents, encoder.vae)
    decoded = torch.cat([decode(item, first=n).cpu() for n, item in enumerate(latents)])
    psnr = vae.psnr(torch.stack(originals), decoded).mean().item()
    std, floor = torch.cat(latents).std().item(), encoder.params.min_psnr
    if not psnr >= floor:
        raise ValueError(
            f"latents.min_psnr: the mean PSNR of decoded latents is {psnr:.1f} dB, below "
            f"{floor:g} dB. The latents' standard deviation is {std:.2f}; it should be about 1. "
            "Either the VAE or the scaling factor in build/base is wrong, or the VAE was trained "
            "on images of another kind or size (data.image_size). If this base model cannot do "
            "better, lower latents.min_psnr"
        )
    return Reconstruction(torch.stack(originals), decoded, psnr, std)


@dataclass(frozen=True)
class _Cutter(Dataset["CutImages | ValueError"]):
    """Decodes images and cuts out their crops. The mirror images of the crops come last."""

    params: LatentsParams
    views: int
    flips: bool
    image_size: int
    seed: int

    def __getitem__(self, samples: list[Sample]) -> CutImages | ValueError:
        try:
            crops, pixels = zip(*map(self._cut, samples), strict=True)
        except ValueError as error:  # a worker that raises would print a traceback
            return error
        return CutImages(tuple(sample.key for sample in samples), crops, torch.cat(pixels))

    def _cut(self, sample: Sample) -> tuple[tuple[Crop, ...], ByteImages]:
        image = transforms.decode(sample.image, name=sample.key)
        height, width = image.shape[1:]
        seed = [self.seed, crc32(sample.key.encode())]
        rng, crops = np.random.default_rng(seed), [transforms.centre_crop(height, width)]
        for _ in range(self.views - 1):
            scale_min = self.params.crop_scale_min
            crops.append(transforms.random_crop(rng, height, width, scale_min=scale_min))
        cuts: list[Tensor] = []
        for view, crop in enumerate(crops):
            strength = self.params.colour_jitter if view > 0 else 0.0
            cut = transforms.apply_crop(image, crop, size=self.image_size)
            rng = np.random.default_rng([*seed, view])
            cuts.append(transforms.jitter_colours(cut, rng, strength=strength))
        if self.flips:
            crops += [replace(crop, mirrored=not crop.mirrored) for crop in crops]
            cuts += [cut.flip(-1) for cut in cuts]
        return tuple(crops), torch.stack(cuts)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
