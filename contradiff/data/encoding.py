"""Whole shards of images => latents, at the pace of the VAE: what `stages.latents` is made of.

chunks of encoded images => decoded and cut in other processes => encoded in this one, in order
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from contradiff.base.vae import decode_latents, downsampling_factor, mode, psnr
from contradiff.data.latents import (
    LatentsParams,
    StoredLatents,
    Views,
    cut_views,
    encode_views,
    split_samples,
)
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Record, Sample, ShardIndex
from contradiff.data.transforms import apply_crop, decode
from contradiff.files import describe_bytes
from contradiff.types import ByteImages

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

EVALUATED = frozenset({"val"})
"""Splits that are only evaluated: they have the centre crop alone."""

_TAR_BLOCK, _TAR_RECORD, _NPY_HEADER = 512, 10240, 128


@dataclass(frozen=True)
class Chunk:
    """Images that are encoded together, never of two shards: results do not depend on who does it.

    Attributes:
        samples: encoded images.
        views: crops of each.
        flips: whether each crop's mirror image is encoded too.
    """

    samples: Sequence[Sample]
    views: int
    flips: bool


def views_of(split: str, params: LatentsParams) -> tuple[int, bool]:
    """How many crops of an image a split has, and whether their mirror images too."""
    return (1, False) if split in EVALUATED else (params.views, params.flips)


def chunks_of(samples: Iterable[Sample], *, split: str, params: LatentsParams) -> Iterator[Chunk]:
    """Yield a shard's images in chunks; the last one when the shard has been read and checked."""
    views, flips = views_of(split, params)
    for chunk in split_samples(samples, params=params, views=views, flips=flips):
        yield Chunk(chunk, views, flips)


class _Cutter(Dataset["Views | ValueError"]):
    """Its "indices" are chunks, which the loader hands to its workers."""

    def __init__(self, params: LatentsParams, *, image_size: int, seed: int) -> None:
        self.params, self.image_size, self.seed = params, image_size, seed

    def __getitem__(self, chunk: Chunk) -> Views | ValueError:
        try:
            return cut_views(
                chunk.samples,
                params=self.params,
                views=chunk.views,
                flips=chunk.flips,
                image_size=self.image_size,
                seed=self.seed,
            )
        except ValueError as error:  # raised by a worker, it would come as a traceback
            return error


def encode_chunks(
    vae: "AutoencoderKL",
    chunks: Iterable[Chunk],
    *,
    params: LatentsParams,
    image_size: int,
    seed: int,
    device: torch.device,
    num_workers: int,
) -> Iterator[StoredLatents]:
    """Encode images, in order.

    Args:
        vae: frozen, float32, on `device`.
        chunks: read in this process, somewhat ahead of the encoding.
        params: how crops are distorted and stored.
        image_size: side of the crops, in pixels.
        seed: of the random crops and colours.
        device: where the VAE runs.
        num_workers: processes that decode and cut images; 0: this one does.

    Raises:
        ValueError: an image cannot be decoded.
    """
    loader = DataLoader(
        _Cutter(params, image_size=image_size, seed=seed),
        sampler=chunks,
        batch_size=None,
        num_workers=num_workers,
    )
    for views in loader:
        if isinstance(views, ValueError):
            raise views
        yield from encode_views(vae, views, dtype=params.dtype, device=device)


def shard_bytes(num_samples: int, *, stored_views: int, moments_shape: Sequence[int]) -> int:
    """Size of an uncompressed shard of latents; gzip saves a few hundredths of it.

    Args:
        num_samples: images.
        stored_views: of each, mirror images included.
        moments_shape: 2c, s/f, s/f.
    """

    def member(num_bytes: int) -> int:
        return _TAR_BLOCK + _round_up(_NPY_HEADER + num_bytes, _TAR_BLOCK)

    num_values = stored_views * torch.Size(moments_shape).numel()
    sample = member(2 * num_values) + member(stored_views * 5 * 4)
    return _round_up(num_samples * sample + 2 * _TAR_BLOCK, _TAR_RECORD)


def latents_bytes(
    index: ShardIndex[ImageInfo], vae: "AutoencoderKL", *, params: LatentsParams, image_size: int
) -> dict[str, int]:
    """What the latents of each split will take on disk, uncompressed."""
    side = image_size // downsampling_factor(vae)
    shape = (2 * vae.config["latent_channels"], side, side)
    cost: dict[str, int] = {}
    for split, shards in index.splits.items():
        views, flips = views_of(split, params)
        stored_views = views * (1 + flips)
        cost[split] = sum(
            shard_bytes(shard.num_samples, stored_views=stored_views, moments_shape=shape)
            for shard in shards
        )
    return cost


def describe_cost(
    cost: Mapping[str, int], index: ShardIndex[ImageInfo], params: LatentsParams
) -> str:
    """One line: what each split takes, and why."""
    parts: list[str] = []
    for split, num_bytes in cost.items():
        views, flips = views_of(split, params)
        shown = f"{views} view{'s' if views > 1 else ''}{' and their mirror images' * flips}"
        parts.append(
            f"{split} {describe_bytes(num_bytes)} ({index.num_samples(split):,} x {shown})"
        )
    return f"{describe_bytes(sum(cost.values()))} of latents: {', '.join(parts)}"


@dataclass(frozen=True)
class Reconstruction:
    """Images and what their stored latents decode to.

    Attributes:
        originals: the centre crops.
        decoded: the decoded first views.
        std: standard deviation of the scaled latents, which the scaling factor makes about 1.
    """

    originals: ByteImages
    decoded: ByteImages
    std: float

    @classmethod
    def of(
        cls,
        vae: "AutoencoderKL",
        images: Sequence[Sample],
        records: Sequence[Record],
        *,
        info: LatentInfo,
        device: torch.device,
    ) -> "Reconstruction":
        """Decode latents as a reader of the shards finds them.

        Args:
            vae: on `device`.
            images: what was encoded.
            records: their latents.
            info: of the latents' index.
            device: where the VAE runs.
        """
        originals: list[torch.Tensor] = []
        decoded: list[torch.Tensor] = []
        latents: list[torch.Tensor] = []
        for image, record in zip(images, records, strict=True):
            stored = StoredLatents.of_record(record)
            pixels = decode(image.image, name=image.key)
            originals.append(apply_crop(pixels, stored.crops[0], size=info.image_size))
            moments = torch.from_numpy(stored.moments[:1]).to(device)
            latents.append(mode(moments, scaling_factor=info.scaling_factor))
            decoded.append(decode_latents(vae, latents[-1]).cpu())
        std = torch.cat(latents).std().item()
        return cls(torch.stack(originals), torch.cat(decoded), std)

    @property
    def psnr(self) -> float:
        """On average over the images, in dB."""
        return psnr(self.originals, self.decoded).mean().item()

    def check(self, *, floor: float) -> None:
        """Refuse latents that show too little of their images.

        Raises:
            ValueError: the PSNR is below `floor`, in dB; names latents.min_psnr and likely causes.
        """
        if not self.psnr >= floor:
            raise ValueError(
                f"latents.min_psnr: decoded latents show their images at {self.psnr:.1f} dB where "
                f"{floor:g} are asked for; their standard deviation is {self.std:.2f}, and should "
                "be about 1. Either build/base has a wrong VAE or scaling factor, or its VAE was "
                "made for images of another kind or size (data.image_size). If the base can do no "
                "better, lower latents.min_psnr"
            )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
