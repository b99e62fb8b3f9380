"""Shards of images => uint8 batches, as extractors take them."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from contradiff.data.shards import read_images, read_split
from contradiff.data.transforms import apply_crop, centre_crop, decode
from contradiff.types import ByteImages


def reference_batches(
    folder: Path, *, split: str, image_size: int, batch_size: int
) -> Iterator[tuple[ByteImages, Int64[Tensor, " batch"]]]:
    """Yield a split's real images, Resize(size) + CenterCrop(size), and their labels, in order."""
    samples = read_images(folder, split)
    while chunk := list(islice(samples, batch_size)):
        decoded = [decode(sample.image, name=sample.key) for sample in chunk]
        crops = [
            apply_crop(image, centre_crop(*image.shape[1:]), size=image_size) for image in decoded
        ]
        yield torch.stack(crops), torch.tensor([sample.label for sample in chunk])


def generated_batches(folder: Path, *, batch_size: int) -> Iterator[ByteImages]:
    """Yield generated images as they are stored, in order.

    Raises:
        ValueError: images of several sizes.
    """
    records = read_split(folder, "sample")
    while chunk := list(islice(records, batch_size)):
        images = [decode(record["png"], name=record["__key__"].decode()) for record in chunk]
        if len({image.shape for image in images}) > 1:
            msg = f"{folder}: images of several sizes; run `dvc repro -f generate`"
            raise ValueError(msg)
        yield torch.stack(images)
