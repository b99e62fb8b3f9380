"""Validation images that samples are conditioned on, stored as the model sees them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from contradiff.data.png import encode_png
from contradiff.data.shard_info import ConditionInfo
from contradiff.data.shards import (
    Record,
    ShardIndex,
    ShardParams,
    array_from_bytes,
    array_to_bytes,
    read_shard,
    write_split,
)
from contradiff.data.transforms import decode
from contradiff.features.batches import CleanBatch
from contradiff.types import ByteImages, Latents, to_bytes

SPLIT = "condition"


@dataclass(frozen=True)
class ConditionImage:
    """One image as pixels and as a latent; both are batches of one."""

    image: ByteImages
    latent: Latents


def write_conditions(
    folder: Path,
    batches: Iterable[CleanBatch],
    *,
    num_images: int,
    params: ShardParams,
    on_progress: Callable[[int], None],
) -> None:
    """Store the first images of a set, without loss.

    Args:
        folder: to write, empty.
        batches: the images in order.
        num_images: at most so many are stored; 0 writes an index that says so.
        params: how they are packed.
        on_progress: told the number of images of each shard.
    """
    records = islice((record for batch in batches for record in _records(batch)), num_images)
    shards = write_split(folder, SPLIT, records, **params.model_dump(), on_progress=on_progress)
    ShardIndex({SPLIT: shards}, ConditionInfo()).write(folder)


def condition_images(folder: Path, *, start: int) -> Iterator[ConditionImage]:
    """Yield stored images one by one, in order, endlessly: after the last comes the first.

    Args:
        folder: as `write_conditions` left it.
        start: index of the first image that is wanted; earlier shards are not read.

    Raises:
        ValueError: there are none, or a shard is missing or damaged; names the folder or file.
    """
    index = ShardIndex.read(folder, ConditionInfo)
    num_images = index.num_samples(SPLIT)
    if num_images == 0:
        raise ValueError(
            f"{folder}: holds no images; set generate.condition to image and run "
            "`dvc repro conditions`"
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
