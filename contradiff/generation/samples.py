"""Shards of generated images, and a figure of the first images."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import torch

from contradiff.data import shards
from contradiff.data.png import encode_png, image_grid, paired_grid
from contradiff.data.shard_info import SampleInfo
from contradiff.data.transforms import decode
from contradiff.files import sha256_of
from contradiff.generation.condition_images import condition_images
from contradiff.generation.params import GenerateParams
from contradiff.method.checkpoint import base_digest
from contradiff.method.weights import WEIGHTS_NAME
from contradiff.types import ByteImages

SPLIT = "sample"
DESCRIPTIONS = {
    "noise": "unconditional: c(noise)",
    "image": "image-conditional: c(image), validation images in order",
    "class": "class-conditional: balanced labels",
}


def describe_samples(
    params: GenerateParams, *, seed: int, checkpoint: Path, base: Path
) -> SampleInfo:
    """Return the facts for the samples' index.json: settings, hashes of the model and its base."""
    settings = params.model_dump(exclude={"batch_size"}) | {
        "condition": DESCRIPTIONS[params.condition],
        "seed": seed,
        "checkpoint_sha256": sha256_of(checkpoint / WEIGHTS_NAME),
        "base_sha256": base_digest(base),
    }
    return SampleInfo.model_validate(settings)


def max_bytes(num_samples: int, *, image_size: int) -> int:
    """Return the most bytes that the shards of samples can have: pixels, PNG and tar headers."""
    return num_samples * (image_size * (3 * image_size + 1) + 3072)


def seconds_of_batch(sample: Callable[[int], object], *, num_steps: int) -> float:
    """Extrapolate the seconds of a batch of `num_steps` steps; `sample(n)` makes one in n steps."""
    sample(1)  # the first call is slower
    seconds: list[float] = []
    for few in (2, 4):
        started = time.perf_counter()
        sample(few)
        seconds.append(time.perf_counter() - started)
    of_step = max(0.0, seconds[1] - seconds[0]) / 2
    return max(seconds[0] + (num_steps - 2) * of_step, 0.0)


def plan_samples(num_samples: int, params: shards.ShardParams) -> dict[str, range]:
    """Divide the samples into shards; return each shard's name with the indices of its samples."""
    size, kind = params.samples_per_shard, params.compression
    starts = enumerate(range(0, num_samples, size))
    whole = range(num_samples)
    return {shards.shard_name(SPLIT, n, kind): whole[start : start + size] for n, start in starts}


def sample_records(
    indices: range, batches: Iterable[ByteImages], *, num_classes: int | None
) -> Iterator[shards.Record]:
    """Yield the images as shard records. The image of index i has the label i mod num_classes."""
    for number, image in zip(indices, chain.from_iterable(batches), strict=True):
        label = {} if num_classes is None else {"cls": str(number % num_classes).encode()}
        yield {"__key__": f"{number:06d}".encode(), "png": encode_png(image), **label}


def sample_figure(samples: Path, *, conditions: Path | None) -> bytes:
    """Draw the first samples as a PNG. With `conditions`, each row is below its conditions."""
    number = 96 if conditions is None else 48
    records = islice(shards.read_split(samples, SPLIT), number)
    images = torch.stack([decode(item["png"], name=str(item["__key__"])) for item in records])
    if conditions is None:
        return image_grid(images, columns=16)
    given = islice(condition_images(conditions, start=0), len(images))
    return paired_grid(torch.cat([image for image, _ in given]), images, columns=16)
