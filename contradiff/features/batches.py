"""Batches of images for a feature model: clean latents, pixels, labels and keys.

The images are read from shards (`StoredImages`, `stored_batches`) or given as a tensor
(`encode_images`). Nothing is random: the latent is the VAE's posterior mean of the centre crop.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from contradiff.base.vae import encode, mode, scaling_factor
from contradiff.data.latents import StoredLatents
from contradiff.data.map_ahead import map_ahead
from contradiff.data.pairs import Pair, PairedShards
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Sample, ShardIndex, image_of, read_shard
from contradiff.data.transforms import Crop, apply_crop, centre_crop, decode
from contradiff.types import ByteImages, Latents, Pixels, to_pixels

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Item = TypeVar("Item")
_Row: TypeAlias = tuple[str, int, Tensor, Tensor]  # key, label, clean latent, pixels as bytes


@dataclass(frozen=True)
class CleanBatch:
    """A batch of images for a feature model. An image's index in its data set seeds its noise.

    `latents` are clean and at unit scale. If a model reads no latents, they are empty: (batch, 1,
    0, 0). `pixels` are in [-1, 1]. If a model reads no pixels, they are empty: (batch, 3, 0, 0).
    """

    indices: tuple[int, ...]
    latents: Latents
    pixels: Pixels
    labels: Int64[Tensor, " batch"]
    keys: tuple[str, ...]

    def split(self, size: int) -> Iterator["CleanBatch"]:
        """Yield the same images in batches of at most `size`."""
        for rows in (slice(start, start + size) for start in range(0, len(self.keys), size)):
            yield CleanBatch(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class StoredImages:
    """A folder of image shards and a folder of the same images' latents, read shard by shard.

    No batch has images of two shards, so a shard's features do not depend on other shards.
    `num_threads` threads decode images in advance; 0 means none.
    """

    images: Path
    latents: Path
    batch_size: int
    num_threads: int

    @cached_property
    def index(self) -> ShardIndex[ImageInfo]:
        """Read the index of the image shards."""
        return ShardIndex.read(self.images, ImageInfo)

    @property
    def shards(self) -> list[tuple[str, int]]:
        """Return the split and the number of every shard."""
        return [(name, i) for name, own in self.index.splits.items() for i in range(len(own))]

    def num_samples(self, split: str, number: int) -> int:
        """Return the number of images in one shard."""
        return self.index.shards(split)[number].num_samples

    def latent_batches(self, split: str, number: int, *, with_pixels: bool) -> Iterator[CleanBatch]:
        """Yield one shard's clean latents. `with_pixels` adds the pixels of the same crops."""
        pairs = PairedShards.open(self.images, self.latents, split=split)
        make = partial(_clean_row, info=pairs.latent_index.info, with_pixels=with_pixels)
        yield from self._batches(split, number, make, pairs.read(number))

    def pixel_batches(
        self, split: str, number: int, *, size: int, crop_fraction: float
    ) -> Iterator[CleanBatch]:
        """Yield one shard's centre crops, resized to `size` pixels. No latents are read."""
        shard = self.index.shards(split)[number]
        samples = map(image_of, read_shard(self.images / shard.name, shard))
        make = partial(centre_row, size=size, crop_fraction=crop_fraction)
        yield from self._batches(split, number, make, samples)

    def _batches(
        self, split: str, number: int, make: Callable[[Item], _Row], items: Iterable[Item]
    ) -> Iterator[CleanBatch]:
        first_index = sum(self.num_samples(split, earlier) for earlier in range(number))
        num_ahead = 2 * self.batch_size  # number of images that are decoded in advance
        rows = map_ahead(make, items, num_threads=self.num_threads, num_ahead=num_ahead)
        yield from _batched(rows, first_index=first_index, batch_size=self.batch_size)


def stored_batches(
    images: Path,
    latents: Path,
    *,
    split: str,
    batch_size: int,
    chosen: Sequence[int] | None = None,
    view: int = 0,
) -> Iterator[CleanBatch]:
    """Yield batches of a split's images, in order.

    If ascending indices `chosen` are given, the batches have only these images, numbered from 0.
    `view` is the number of the stored view whose latents are read. Pixels are the centre crop's.
    """
    pairs = PairedShards.open(images, latents, split=split)
    records = (pair for shard in range(pairs.num_shards) for pair in pairs.read(shard))
    if chosen is not None:
        wanted = frozenset(chosen)
        records = islice(records, max(chosen, default=-1) + 1)
        records = (pair for index, pair in enumerate(records) if index in wanted)
    make = partial(_clean_row, info=pairs.latent_index.info, with_pixels=True, view=view)
    yield from _batched(map(make, records), first_index=0, batch_size=batch_size)


@torch.no_grad()
def encode_images(
    vae: "AutoencoderKL", images: ByteImages, labels: Int64[Tensor, " n"], *, size: int
) -> CleanBatch:
    """Resize square images to `size` pixels (bicubic), and encode them as one batch."""
    batch = resized_batch(images, labels, centre_crop(*images.shape[2:]), size=size)
    moments = encode(vae, batch.pixels.to(vae.device))
    return replace(batch, latents=mode(moments, scaling_factor=scaling_factor(vae)).cpu())


def resized_batch(
    images: ByteImages, labels: Int64[Tensor, " num_images"], crop: Crop, *, size: int
) -> CleanBatch:
    """Take the same crop of each image, resize it, and return a batch without latents."""
    pixels = to_pixels(torch.stack([apply_crop(image, crop, size=size) for image in images]))
    indices = tuple(range(len(images)))
    no_latents = torch.empty(len(images), 1, 0, 0)
    return CleanBatch(indices, no_latents, pixels, labels, tuple(map(str, indices)))


def central_crop(height: int, width: int, *, crop_fraction: float) -> Crop:
    """Return the central square whose side is `crop_fraction` times the image's shorter side."""
    whole = centre_crop(height, width)
    side = max(1, round(whole.height * crop_fraction))
    offset = (whole.height - side) // 2
    return Crop(whole.top + offset, whole.left + offset, side, side, mirrored=False)


def centre_row(sample: Sample, *, size: int, crop_fraction: float) -> _Row:
    """Crop the image's centre, `crop_fraction` of its shorter side, and resize it to `size`.

    timm first resizes, then crops. The results differ only at the border.
    *Deviation*: the resize is always antialiased bicubic, even if timm's differs for this backbone.
    """
    image = decode(sample.image, name=sample.key)
    crop = central_crop(*image.shape[1:], crop_fraction=crop_fraction)
    return sample.key, sample.label, torch.empty(1, 0, 0), apply_crop(image, crop, size=size)


def _clean_row(pair: Pair, *, info: LatentInfo, with_pixels: bool, view: int = 0) -> _Row:
    sample, stored = image_of(pair[0]), StoredLatents.of_record(pair[1])
    pixels = torch.empty(3, 0, 0, dtype=torch.uint8)
    if with_pixels:
        image = decode(sample.image, name=sample.key)
        pixels = apply_crop(image, stored.crops[0], size=info.image_size)
    moments = torch.from_numpy(stored.moments[view : view + 1])
    [latent] = mode(moments, scaling_factor=info.scaling_factor)
    return sample.key, sample.label, latent, pixels


def _batched(rows: Iterator[_Row], *, first_index: int, batch_size: int) -> Iterator[CleanBatch]:
    while chunk := list(islice(rows, batch_size)):
        keys, labels, latents, pixels = zip(*chunk, strict=True)
        indices = tuple(range(first_index, first_index + len(chunk)))
        shown = to_pixels(torch.stack(pixels))
        yield CleanBatch(indices, torch.stack(latents), shown, torch.tensor(labels), tuple(keys))
        first_index += len(chunk)
