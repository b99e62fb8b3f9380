"""Features of stored latents for evaluation: the clean latent, brought to three fixed levels.

image shards + latent shards => maps (n 3 c h w) or features h (n d), with labels
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contradiff.data.shards import image_of
from contradiff.data.transforms import apply_crop, centre_crop, decode, to_pixels
from contradiff.features import FeaturesParams, LevelMaps
from contradiff.inversion import inverted_maps
from contradiff.latents import StoredLatents, encode, mode, scaling_factor
from contradiff.loading import PairedShards
from contradiff.model import ContraDiff
from contradiff.noise import NUM_LEVELS
from contradiff.types import ByteImages, Latents, Pixels

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Pool = Literal["attention", "mean", "none"]
"""attention: h of Eq. 4 | mean: the three maps averaged over space | none: the maps themselves."""


@dataclass(frozen=True)
class CleanBatch:
    """Images to be featured: where they stand in the set, latents, pixels, labels, keys."""

    first_index: int
    latents: Latents
    pixels: Pixels
    labels: Int64[Tensor, " batch"]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class FeatureSet:
    """Features of a whole set of images, on the CPU."""

    features: Float[Tensor, "num_images *shape"]
    labels: Int64[Tensor, " num_images"]
    keys: tuple[str, ...]


def stored_batches(
    images: Path, latents: Path, *, split: str, batch_size: int
) -> Iterator[CleanBatch]:
    """Yield a split's images in order: the centre crop's latent mean and its pixels."""
    pairs = PairedShards.open(images, latents, split=split)
    facts = pairs.latent_index.facts
    records = (pair for shard in range(pairs.num_shards) for pair in pairs.read(shard))
    first_index = 0
    while chunk := list(islice(records, batch_size)):
        samples = [image_of(image) for image, _ in chunk]
        stored = [StoredLatents.of_record(latent) for _, latent in chunk]
        pixels = [
            apply_crop(decode(item.image, name=item.key), view.crops[0], size=facts["image_size"])
            for item, view in zip(samples, stored, strict=True)
        ]
        moments = torch.stack([torch.from_numpy(view.moments[0]) for view in stored])
        yield CleanBatch(
            first_index,
            mode(moments, scaling_factor=facts["scaling_factor"]),
            to_pixels(torch.stack(pixels)),
            torch.tensor([item.label for item in samples]),
            tuple(item.key for item in samples),
        )
        first_index += len(chunk)


@torch.inference_mode()
def maps_of(
    model: ContraDiff,
    batch: CleanBatch,
    *,
    params: FeaturesParams,
    seed: int,
    device: torch.device,
) -> LevelMaps:
    """Maps of a batch at the evaluation triple, noised directly (Eq. 5) or along a DDIM chain.

    Random noise, which the chain has none of, is seeded by each image's index: features do not
    depend on the batch size.

    Raises:
        ValueError: a timestep is outside the base's schedule, or not on the chain's grid.
    """
    if max(params.timesteps) >= model.schedule.num_train_timesteps:
        msg = (
            f"features.timesteps: {params.timesteps} goes beyond the base's last timestep, "
            f"{model.schedule.num_train_timesteps - 1}"
        )
        raise ValueError(msg)
    if params.condition == "image":
        conditions = model.conditioner.choose(pixels=batch.pixels, latents=batch.latents)
    else:
        conditions = torch.stack(
            [
                _image_noise(model.conditioner.shape, seed=seed + 1, index=batch.first_index + i)
                for i in range(len(batch.labels))
            ]
        )
    tokens = model.encode_condition(conditions.to(device))
    latents = batch.latents.to(device)
    if params.noising == "ddim_chain":
        return inverted_maps(model, latents, tokens, timesteps=params.timesteps)
    noise = torch.stack(
        [
            _image_noise((NUM_LEVELS, *latents.shape[1:]), seed=seed, index=batch.first_index + i)
            for i in range(len(latents))
        ],
        dim=1,
    )
    return model.level_maps(latents, tokens, timesteps=params.timesteps, noise=noise.to(device))


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
    """Features of all batches.

    Args:
        model: evaluation mode, on `device`.
        batches: in order.
        params: the evaluation triple and the condition.
        pool: what is kept of the three maps.
        seed: of the noise.
        device: where to compute.
        on_progress: told the number of images of each batch.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []
    for batch in batches:
        maps = maps_of(model, batch, params=params, seed=seed, device=device)
        match pool:
            case "attention":
                pooled = model.attention(maps)
            case "mean":
                pooled = maps.mean(dim=(3, 4)).flatten(1)
            case "none":
                pooled = maps
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
        yield CleanBatch(
            first_index,
            mode(moments, scaling_factor=scaling_factor(vae)).cpu(),
            pixels,
            labels[rows],
            tuple(str(index) for index in range(first_index, first_index + len(pixels))),
        )
