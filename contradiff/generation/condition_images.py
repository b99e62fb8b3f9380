"""The validation images that samples are conditioned on, as pixels and as latents."""

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
    """Store the first images of a set without loss.

    Args:
        folder: Empty folder to write.
        batches: The images in order.
        num_images: Largest number of images to store; 0 writes an empty index.
        params: How shards are packed.
        on_progress: Called with the number of images of each shard.
    """
    records = islice((record for batch in batches for record in _records(batch)), num_images)
    shards = write_split(folder, SPLIT, records, **params.model_dump(), on_progress=on_progress)
    ShardIndex({SPLIT: shards}, ConditionInfo()).write(folder)


def condition_images(folder: Path, *, start: int) -> Iterator[ConditionImage]:
    """Yield the stored images in order, endlessly: after the last one comes the first.

    Args:
        folder: Folder that `write_conditions` wrote.
        start: Index of the first image to yield; earlier shards are not read.

    Raises:
        ValueError: There are no images, or a shard is missing or damaged.
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
