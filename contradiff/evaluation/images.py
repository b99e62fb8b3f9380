"""Shards of images => uint8 batches, as extractors take them."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from contradiff.data.shards import Sample, Shard, image_of, read_images, read_shard
from contradiff.data.transforms import apply_crop, centre_crop, decode
from contradiff.types import ByteImages


def reference_batches(
    folder: Path, *, split: str, image_size: int, batch_size: int
) -> Iterator[tuple[ByteImages, Int64[Tensor, " batch"]]]:
    """Yield a split's real images, Resize(size) + CenterCrop(size), and their labels, in order."""
    samples = read_images(folder, split)
    while chunk := list(islice(samples, batch_size)):
        yield _crops(chunk, image_size), torch.tensor([sample.label for sample in chunk])


def reference_shard(
    folder: Path, shard: Shard, *, image_size: int, batch_size: int
) -> Iterator[ByteImages]:
    """Yield one shard's real images, Resize(size) + CenterCrop(size), in order."""
    samples = (image_of(record) for record in read_shard(folder / shard.name, shard))
    while chunk := list(islice(samples, batch_size)):
        yield _crops(chunk, image_size)


def generated_shard(
    folder: Path, shard: Shard, *, image_size: int, batch_size: int
) -> Iterator[ByteImages]:
    """Yield one shard's generated images as they are stored, in order.

    Raises:
        ValueError: an image has not data.image_size pixels a side; names it.
    """
    records = read_shard(folder / shard.name, shard)
    while chunk := list(islice(records, batch_size)):
        images: list[Tensor] = []
        for record in chunk:
            name = record["__key__"].decode()
            image = decode(record["png"], name=name)
            if image.shape[1:] != (image_size, image_size):
                height, width = image.shape[1:]
                raise ValueError(
                    f"{folder / shard.name}: image {name} has {height}x{width} pixels, not "
                    f"{image_size}x{image_size} (data.image_size); run `dvc repro -f generate`"
                )
            images.append(image)
        yield torch.stack(images)


def _crops(samples: Iterable[Sample], image_size: int) -> ByteImages:
    decoded = [decode(sample.image, name=sample.key) for sample in samples]
    return torch.stack(
        [apply_crop(image, centre_crop(*image.shape[1:]), size=image_size) for image in decoded]
    )
