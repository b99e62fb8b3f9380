"""Shards of generated images, and the figure that shows the first of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from contradiff.data.map_shards import Made, Tick
from contradiff.data.png import encode_png, image_grid, paired_grid
from contradiff.data.shard_info import SampleInfo
from contradiff.data.shards import (
    Record,
    ShardParams,
    read_split,
    shard_name,
    write_shard,
)
from contradiff.data.transforms import decode
from contradiff.files import sha256_of
from contradiff.generation.condition_images import condition_images
from contradiff.generation.conditions import DESCRIPTIONS
from contradiff.generation.sampling import GenerateParams
from contradiff.method.checkpoint import WEIGHTS_NAME, base_digest
from contradiff.types import ByteImages

SPLIT = "sample"
GRID_IMAGES, GRID_COLUMNS = 96, 16


def describe_samples(
    params: GenerateParams, *, seed: int, checkpoint: Path, base: Path
) -> SampleInfo:
    """Describe samples for their index: their settings, and hashes of the model and its base."""
    settings: dict[str, Any] = {
        **params.model_dump(exclude={"condition", "guidance", "batch_size"}),
        "seed": seed,
        "checkpoint_sha256": sha256_of(checkpoint / WEIGHTS_NAME),
        "base_sha256": base_digest(base),
    }
    condition = DESCRIPTIONS[params.condition]
    return SampleInfo(condition=condition, guidance=params.guidance, **settings)


@dataclass(frozen=True)
class PlannedSamples:
    """A shard to write; each of its images depends only on its own index."""

    name: str
    indices: range


def plan_samples(num_samples: int, params: ShardParams) -> list[PlannedSamples]:
    """Divide the samples into shards, in order."""
    size = params.samples_per_shard
    return [
        PlannedSamples(
            shard_name(SPLIT, number, params.compression),
            range(start, min(start + size, num_samples)),
        )
        for number, start in enumerate(range(0, num_samples, size))
    ]


def write_samples(
    planned: PlannedSamples,
    tick: Tick,
    *,
    make: Callable[[range], Iterator[ByteImages]],
    num_classes: int | None,
    work_dir: Path,
    params: ShardParams,
    on_images: Callable[[ByteImages], None],
) -> Made:
    """Generate one shard of samples in `work_dir`, for `map_shards`.

    Args:
        planned: The shard.
        tick: Called with the number of images of each batch.
        make: Yields batches of images for the given sample indices.
        num_classes: Image i has the label i mod num_classes; None: images have no labels.
        work_dir: Folder to write to.
        params: How shards are packed.
        on_images: Called with each batch.
    """

    def records() -> Iterator[Record]:
        numbers = iter(planned.indices)
        for images in make(planned.indices):
            for image in images:
                number = next(numbers)
                record = {"__key__": f"{number:06d}".encode(), "png": encode_png(image)}
                if num_classes is not None:
                    record["cls"] = str(number % num_classes).encode()
                yield record
            on_images(images)
            tick(len(images))

    shard = write_shard(work_dir / planned.name, records(), compression=params.compression)
    return Made((shard,))


def sample_figure(samples: Path, *, conditions: Path | None) -> bytes:
    """Draw the first samples as a PNG.

    Args:
        samples: Shards of the samples.
        conditions: Shards of the images that the samples are conditioned on; each row of them
            stands above the row of their samples. None: no images.
    """
    number = GRID_IMAGES if conditions is None else GRID_IMAGES // 2
    records = islice(read_split(samples, SPLIT), number)
    images = torch.stack([decode(item["png"], name=str(item["__key__"])) for item in records])
    if conditions is None:
        return image_grid(images, columns=GRID_COLUMNS)
    given = islice(condition_images(conditions, start=0), len(images))
    return paired_grid(torch.cat([item.image for item in given]), images, columns=GRID_COLUMNS)
