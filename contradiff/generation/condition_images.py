"""The validation images that image-conditional generation needs, to store and as stored."""

from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import torch

from contradiff.data import shards
from contradiff.data.png import encode_png
from contradiff.data.shard_info import ConditionInfo
from contradiff.data.transforms import decode
from contradiff.features.batches import CleanBatch
from contradiff.generation.condition_shards import SPLIT
from contradiff.types import ByteImages, Latents, to_bytes


def condition_records(batches: Iterable[CleanBatch]) -> Iterator[shards.Record]:
    """Yield the images and latents of `batches` as shard records, without loss."""
    for each in batches:
        for key, image, latent in zip(each.keys, to_bytes(each.pixels), each.latents, strict=True):
            stored = shards.array_to_bytes(latent.numpy())
            yield {"__key__": key.encode(), "png": encode_png(image), "latent.npy": stored}


def condition_images(folder: Path, *, start: int) -> Iterator[tuple[ByteImages, Latents]]:
    """Yield the stored images from number `start` on. After the last image comes the first.

    Each image is a batch of one, as pixels and as a latent. Raises ValueError if there are no
    images, or if a shard is missing or damaged.
    """
    index = shards.ShardIndex.read(folder, ConditionInfo)
    num_images = index.num_samples(SPLIT)
    if num_images == 0:
        remedy = 'set generate.condition to "image", and run `dvc repro conditions`'
        raise ValueError(f"{folder}: there are no images; {remedy}")
    skip = start % num_images
    for shard in cycle(index.shards(SPLIT)):
        if skip < shard.num_samples:
            for record in islice(shards.read_shard(folder / shard.name, shard), skip, None):
                latent = torch.from_numpy(shards.array_from_bytes(record["latent.npy"]))
                yield decode(record["png"], name=record["__key__"].decode())[None], latent[None]
        skip = max(0, skip - shard.num_samples)
