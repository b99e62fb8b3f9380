"""What samples are conditioned on: noise, images or classes, each sample by its index alone.

Whoever makes sample i, in whatever batch, gives it the same noise and the same condition.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from contradiff.data.png import encode_png
from contradiff.data.shard_info import ConditionInfo
from contradiff.data.shards import (
    Compression,
    Record,
    ShardIndex,
    array_from_bytes,
    array_to_bytes,
    read_shard,
    write_split,
)
from contradiff.data.transforms import decode
from contradiff.features.batches import CleanBatch
from contradiff.generation.class_table import ClassTable
from contradiff.method.model import ContraDiff
from contradiff.types import ByteImages, Conditions, Latents, Tokens, to_bytes, to_pixels

TokensOf = Callable[[range], Tokens]
"""Conditions of the samples of these indices."""

SPLIT = "condition"


@dataclass(frozen=True)
class Conditioning:
    """What samples are conditioned on, and the null condition that guidance leads away from."""

    tokens: TokensOf
    null_tokens: TokensOf


@dataclass(frozen=True)
class ConditionImage:
    """One image to be conditioned on: as pixels and as a latent."""

    image: ByteImages
    latent: Latents


def seeded_noise(
    shape: tuple[int, ...], *, seed: int, index: int, stream: str
) -> Float[Tensor, "..."]:
    """Gaussian noise of one sample: the same at any batch size, device and process count.

    Args:
        shape: of the noise.
        seed: of the run.
        index: of the sample.
        stream: "latent" or "condition": independent noises of one sample.
    """
    offset = {"latent": 0, "condition": 1}[stream]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 2 + offset)
    return torch.randn(shape, generator=generator)


def stacked_noise(
    shape: tuple[int, ...], *, seed: int, indices: range, stream: str
) -> Float[Tensor, "batch ..."]:
    """`seeded_noise` of several samples."""
    return torch.stack([seeded_noise(shape, seed=seed, index=i, stream=stream) for i in indices])


def unconditional(model: ContraDiff, *, seed: int, device: torch.device) -> Conditioning:
    """A condition of Gaussian noise (App. A), c(noise): the null condition itself.

    Args:
        model: evaluation mode, on `device`.
        seed: sample i has noise of (seed, i).
        device: where to compute.
    """

    def tokens(indices: range) -> Tokens:
        noise = stacked_noise(
            model.conditioner.shape, seed=seed, indices=indices, stream="condition"
        )
        return _encoded(model, noise.to(device))

    return Conditioning(tokens, tokens)


def image_conditional(
    model: ContraDiff,
    images_from: Callable[[int], Iterator[ConditionImage]],
    *,
    null_tokens: TokensOf,
    device: torch.device,
) -> Conditioning:
    """Sample i is conditioned on the i-th image (Fig. 4).

    Args:
        model: evaluation mode, on `device`.
        images_from: all images in order from a given index on; see `condition_images`. It is asked
            once for samples that are made in order.
        null_tokens: `unconditional`'s.
        device: where to compute.
    """
    images: Iterator[ConditionImage] = iter(())
    position = -1

    def tokens(indices: range) -> Tokens:
        nonlocal images, position
        if indices.start != position:
            images = images_from(indices.start)
        position = indices.stop
        chosen = [
            model.conditioner.choose(pixels=to_pixels(item.image), latents=item.latent)
            for item in islice(images, len(indices))
        ]
        return _encoded(model, torch.cat(chosen).to(device))

    return Conditioning(tokens, null_tokens)


def class_conditional(table: ClassTable, *, device: torch.device) -> Conditioning:
    """Sample i is of class `balanced_label` (Table 5); the null is the table's last row.

    Args:
        table: evaluation mode, on `device`.
        device: where to compute.
    """

    def tokens_of(labels: list[int]) -> Tokens:
        with torch.inference_mode():
            return table(torch.tensor(labels, device=device))

    def tokens(indices: range) -> Tokens:
        return tokens_of([balanced_label(i, num_classes=table.null_label) for i in indices])

    def null_tokens(indices: range) -> Tokens:
        return tokens_of([table.null_label] * len(indices))

    return Conditioning(tokens, null_tokens)


def balanced_label(index: int, *, num_classes: int) -> int:
    """The class of a sample: all classes in turn."""
    return index % num_classes


def write_conditions(
    folder: Path,
    batches: Iterable[CleanBatch],
    *,
    num_images: int,
    samples_per_shard: int,
    compression: Compression,
    on_progress: Callable[[int], None],
) -> None:
    """Store the first images of a set: what the model sees of each, without loss.

    Args:
        folder: to write, empty.
        batches: the images in order.
        num_images: no more than these; 0 writes an index that says so.
        samples_per_shard: images a shard.
        compression: of the shards.
        on_progress: told the number of images of each shard.
    """
    records = islice((record for batch in batches for record in _records(batch)), num_images)
    shards = write_split(
        folder,
        SPLIT,
        records,
        samples_per_shard=samples_per_shard,
        compression=compression,
        on_progress=on_progress,
    )
    ShardIndex({SPLIT: shards}, ConditionInfo()).write(folder)


def condition_images(folder: Path, *, start: int) -> Iterator[ConditionImage]:
    """Yield stored images one by one, in order, from the first again after the last, endlessly.

    Args:
        folder: as `write_conditions` left it.
        start: index of the first that is wanted; earlier shards are not read.

    Raises:
        ValueError: there are none, or a shard is missing or damaged; names the folder or file.
    """
    index = ShardIndex.read(folder, ConditionInfo)
    num_images = index.num_samples(SPLIT)
    if num_images == 0:
        raise ValueError(
            f"{folder}: holds no images; set generate.condition: image, `dvc repro conditions`"
        )
    skip = start % num_images
    while True:
        for shard in index.shards(SPLIT):
            if skip >= shard.num_samples:
                skip -= shard.num_samples
                continue
            for record in islice(read_shard(folder / shard.name, shard), skip, None):
                yield ConditionImage(
                    decode(record["png"], name=record["__key__"].decode())[None],
                    torch.from_numpy(array_from_bytes(record["latent.npy"]))[None],
                )
            skip = 0


def _records(batch: CleanBatch) -> Iterator[Record]:
    images = to_bytes(batch.pixels)
    for key, image, latent in zip(batch.keys, images, batch.latents, strict=True):
        yield {
            "__key__": key.encode(),
            "png": encode_png(image),
            "latent.npy": array_to_bytes(latent.numpy()),
        }


@torch.inference_mode()
def _encoded(model: ContraDiff, conditions: Conditions) -> Tokens:
    return model.encode_condition(conditions)
