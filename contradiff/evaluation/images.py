"""Stored images, one at a time, as extractors and classifiers see them."""

from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from contradiff.data.map_ahead import map_ahead
from contradiff.data.shards import Record, image_of, read_split
from contradiff.data.transforms import apply_crop, centre_crop, decode
from contradiff.types import ByteImages

Image = UInt8[Tensor, "3 height width"]


def real_image(record: Record, *, image_size: int) -> Image:
    """Decode a real image: Resize(image_size) + CenterCrop(image_size)."""
    sample = image_of(record)
    image = decode(sample.image, name=sample.key)
    return apply_crop(image, centre_crop(*image.shape[1:]), size=image_size)


def generated_image(record: Record, *, image_size: int) -> Image:
    """Decode a generated image.

    Raises:
        ValueError: the image is not `image_size` pixels high and wide.
    """
    name = record["__key__"].decode()
    image = decode(record["png"], name=name)
    if image.shape[1:] != (image_size, image_size):
        height, width = image.shape[1:]
        raise ValueError(
            f"generated image {name} has {height}x{width} pixels, not {image_size}x{image_size} "
            "(data.image_size); run `dvc repro -f generate`"
        )
    return image


def real_images(
    folder: Path, split: str, *, image_size: int, num_workers: int
) -> tuple[ByteImages, Int64[Tensor, " num_images"]]:
    """Read a whole split's real images and their labels into memory, in order."""
    load = partial(real_image, image_size=image_size)
    records = list(read_split(folder, split))
    images = list(map_ahead(load, records, num_threads=num_workers, num_ahead=len(records)))
    return torch.stack(images), torch.tensor([int(record["cls"]) for record in records])
