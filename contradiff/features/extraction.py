"""Features of stored latents for evaluation: the clean latent, brought to three fixed levels.

image shards + latent shards => maps (n 3 c h w) or features h (n d), with labels
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contradiff.base.vae import encode, mode, scaling_factor
from contradiff.data.latents import StoredLatents
from contradiff.data.map_ahead import map_ahead
from contradiff.data.shard_info import LatentInfo
from contradiff.data.shards import image_of
from contradiff.data.streams import Pair, PairedShards
from contradiff.data.transforms import apply_crop, centre_crop, decode
from contradiff.features.inversion import inverted_block_maps
from contradiff.features.params import FeaturesParams
from contradiff.method.attention import LevelMaps
from contradiff.method.model import ContraDiff
from contradiff.method.noise import NUM_LEVELS
from contradiff.method.unet import MapBlock
from contradiff.types import ByteImages, Latents, Pixels, Tokens, to_pixels

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

LOOKAHEAD = 2
"""Batches whose images are decoded while one is computed."""

_Row: TypeAlias = tuple[str, int, Tensor, Tensor]
"""Key, label, moments of the centre crop, its pixels."""

Pool = Literal["attention", "mean"]
"""attention: h of Eq. 4 | mean: the three maps averaged over space."""


@dataclass(frozen=True)
class CleanBatch:
    """Images to be featured.

    Attributes:
        indices: each image's own number in its set, which seeds its noise.
        latents: clean.
        pixels: in [-1, 1].
        labels: classes.
        keys: names.
    """

    indices: tuple[int, ...]
    latents: Latents
    pixels: Pixels
    labels: Int64[Tensor, " batch"]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class FeatureData:
    """Where the images of a feature cache are, and how they are read.

    Attributes:
        images: folder of image shards.
        latents: folder of latent shards, in the same order.
        batch_size: images at once.
        num_threads: that decode images ahead; 0: none.
    """

    images: Path
    latents: Path
    batch_size: int
    num_threads: int


@dataclass(frozen=True)
class FeatureSet:
    """Features of a whole set of images, on the CPU."""

    features: Float[Tensor, "num_images *shape"]
    labels: Int64[Tensor, " num_images"]
    keys: tuple[str, ...]


def stored_batches(
    images: Path,
    latents: Path,
    *,
    split: str,
    batch_size: int,
    chosen: Sequence[int] | None = None,
) -> Iterator[CleanBatch]:
    """Yield a split's images in order: the centre crop's latent mean and its pixels.

    Args:
        images: shards.
        latents: shards.
        split: which.
        batch_size: images at once.
        chosen: those that are yielded, as indices into the split, ascending; None: all. An image's
            noise is seeded by its place among them.
    """
    pairs = PairedShards.open(images, latents, split=split)
    info = pairs.latent_index.info
    records = (pair for shard in range(pairs.num_shards) for pair in pairs.read(shard))
    if chosen is not None:
        wanted = frozenset(chosen)
        records = (pair for index, pair in enumerate(records) if index in wanted)
    rows = (_clean_row(pair, info, with_pixels=True) for pair in records)
    yield from _batched(rows, info, first_index=0, batch_size=batch_size)


def shard_batches(
    pairs: PairedShards, number: int, *, batch_size: int, with_pixels: bool, num_threads: int
) -> Iterator[CleanBatch]:
    """Yield one shard's images in order; no batch reaches beyond the shard.

    So a shard's features do not depend on who computes the others.

    Args:
        pairs: image and latent shards of a split.
        number: of the shard.
        batch_size: images at once.
        with_pixels: whether the pixels are decoded; without, `pixels` has no rows and columns.
        num_threads: that decode ahead; 0: none.
    """
    info = pairs.latent_index.info
    shards = pairs.image_index.shards(pairs.split)
    first_index = sum(shard.num_samples for shard in shards[:number])
    make = partial(_clean_row, info=info, with_pixels=with_pixels)
    rows = map_ahead(
        make, pairs.read(number), num_threads=num_threads, num_ahead=LOOKAHEAD * batch_size
    )
    yield from _batched(rows, info, first_index=first_index, batch_size=batch_size)


def _clean_row(pair: Pair, info: LatentInfo, *, with_pixels: bool) -> _Row:
    sample, stored = image_of(pair[0]), StoredLatents.of_record(pair[1])
    pixels = torch.empty(3, 0, 0, dtype=torch.uint8)
    if with_pixels:
        image = decode(sample.image, name=sample.key)
        pixels = apply_crop(image, stored.crops[0], size=info.image_size)
    return sample.key, sample.label, torch.from_numpy(stored.moments[0]), pixels


def _batched(
    rows: Iterator[_Row], info: LatentInfo, *, first_index: int, batch_size: int
) -> Iterator[CleanBatch]:
    while chunk := list(islice(rows, batch_size)):
        keys, labels, moments, pixels = zip(*chunk, strict=True)
        yield CleanBatch(
            tuple(range(first_index, first_index + len(chunk))),
            mode(torch.stack(moments), scaling_factor=info.scaling_factor),
            to_pixels(torch.stack(pixels)),
            torch.tensor(labels),
            tuple(keys),
        )
        first_index += len(chunk)


def tokens_of(
    model: ContraDiff,
    batch: CleanBatch,
    *,
    params: FeaturesParams,
    seed: int,
    device: torch.device,
) -> Tokens:
    """What conditions a batch: its own image's tokens, those of noise, or zeros for the base."""
    if params.model != "contradiff":
        width = model.unet.config["cross_attention_dim"]
        return torch.zeros(len(batch.labels), 1, width, device=device)
    if params.condition == "image":
        conditions = model.conditioner.choose(pixels=batch.pixels, latents=batch.latents)
    else:
        conditions = torch.stack(
            [
                _image_noise(model.conditioner.shape, seed=seed + 1, index=index)
                for index in batch.indices
            ]
        )
    return model.encode_condition(conditions.to(device))


def level_noise(batch: CleanBatch, *, seed: int) -> Float[Tensor, "3 batch channels h w"]:
    """Noise of a batch's three levels, seeded by each image's index in its split.

    Features so depend neither on the batch size nor on the number of processes.
    """
    return torch.stack(
        [
            _image_noise((NUM_LEVELS, *batch.latents.shape[1:]), seed=seed, index=index)
            for index in batch.indices
        ],
        dim=1,
    )


@torch.inference_mode()
def block_maps_of(
    model: ContraDiff,
    batch: CleanBatch,
    tokens: Tokens,
    *,
    timesteps: Sequence[int],
    noising: str,
    blocks: Sequence[MapBlock],
    seed: int,
    device: torch.device,
) -> dict[MapBlock, LevelMaps]:
    """Maps of a batch at one triple, noised directly (Eq. 5) or along a DDIM chain.

    Raises:
        ValueError: a timestep is outside the base's schedule, or not on the chain's grid.
    """
    check_timesteps(timesteps, num_train_timesteps=model.schedule.num_train_timesteps)
    latents = batch.latents.to(device)
    if noising == "ddim_chain":
        return inverted_block_maps(model, latents, tokens, timesteps=timesteps, blocks=blocks)
    noise = level_noise(batch, seed=seed).to(device)
    return model.level_block_maps(latents, tokens, timesteps=timesteps, noise=noise, blocks=blocks)


def check_timesteps(timesteps: Sequence[int], *, num_train_timesteps: int) -> None:
    """Refuse a triple that the base's schedule does not hold.

    Raises:
        ValueError: names features.timesteps.
    """
    if max(timesteps) >= num_train_timesteps:
        raise ValueError(
            f"features.timesteps: {list(timesteps)} goes beyond the base's last timestep, "
            f"{num_train_timesteps - 1}"
        )


@torch.inference_mode()
def maps_of(
    model: ContraDiff,
    batch: CleanBatch,
    *,
    params: FeaturesParams,
    seed: int,
    device: torch.device,
) -> LevelMaps:
    """Maps of a batch at the evaluation triple; see `block_maps_of`.

    Random noise, which the chain has none of, is seeded by each image's index: features do not
    depend on the batch size.

    Raises:
        ValueError: a timestep is outside the base's schedule, or not on the chain's grid.
    """
    with autocast(device, params.precision):
        tokens = tokens_of(model, batch, params=params, seed=seed, device=device)
        return block_maps_of(
            model,
            batch,
            tokens,
            timesteps=params.timesteps,
            noising=params.noising,
            blocks=[model.block],
            seed=seed,
            device=device,
        )[model.block]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of features.precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.inference_mode()
def extract(
    model: ContraDiff,
    batches: Iterable[CleanBatch],
    *,
    params: FeaturesParams,
    pool: Pool,
    seed: int,
    device: torch.device,
    on_progress: Callable[[int], None],
) -> FeatureSet:
    """Features of ContraDiff or a bare copy of its base, in memory: for some thousand images.

    Args:
        model: evaluation mode, on `device`.
        batches: in order.
        params: the evaluation triple, the condition and the precision.
        pool: what is kept of the three maps.
        seed: of the noise.
        device: where to compute.
        on_progress: told the number of images of each batch.

    Raises:
        ValueError: params.model names another model than contradiff.
    """
    if params.model != "contradiff":
        raise ValueError(
            f"features.model: {params.model} is no ContraDiff; these features need contradiff"
        )
    features: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []
    for batch in batches:
        maps = maps_of(model, batch, params=params, seed=seed, device=device)
        with autocast(device, params.precision):
            if pool == "attention":
                pooled = model.attention(maps)
            else:
                pooled = maps.mean(dim=(3, 4)).flatten(1)
        features.append(pooled.float().cpu())
        labels.append(batch.labels)
        keys += batch.keys
        on_progress(len(batch.labels))
    return FeatureSet(torch.cat(features), torch.cat(labels), tuple(keys))


def _image_noise(shape: Sequence[int], *, seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 10_000_019 + index)
    return torch.randn(*shape, generator=generator)


def encoded_batches(
    vae: "AutoencoderKL",
    images: ByteImages,
    labels: Int64[Tensor, " num_images"],
    *,
    image_size: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[CleanBatch]:
    """Yield images that are in memory, resized (bicubic, as Table 6's 32 -> 256) and encoded.

    Args:
        vae: on `device`.
        images: all images, square.
        labels: their classes.
        image_size: side of the model's pixels.
        batch_size: images at once.
        device: where the VAE runs.
    """
    whole = centre_crop(*images.shape[2:])
    for first_index in range(0, len(images), batch_size):
        rows = slice(first_index, first_index + batch_size)
        resized = torch.stack([apply_crop(image, whole, size=image_size) for image in images[rows]])
        pixels = to_pixels(resized)
        moments = encode(vae, pixels.to(device))
        indices = tuple(range(first_index, first_index + len(pixels)))
        yield CleanBatch(
            indices,
            mode(moments, scaling_factor=scaling_factor(vae)).cpu(),
            pixels,
            labels[rows],
            tuple(map(str, indices)),
        )
