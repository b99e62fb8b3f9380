"""Training batches: image shards and latent shards read side by side, in an order fixed by a seed.

shard i of images, shard i of latents => (image bytes, views) pairs => shuffled => two chosen views
with their moments and the pixels that condition them (or latents, or the label)
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from contradiff.data.shards import Sample, ShardIndex, image_of, read_shard
from contradiff.data.transforms import Crop, apply_crop, decode, random_crop, to_pixels
from contradiff.latents import StoredLatents

SHUFFLE_BUFFER = 2048
"""Samples held while shuffling; shards are themselves shuffled when written."""

Pair = tuple[dict[str, bytes], dict[str, bytes]]


@dataclass(frozen=True)
class ViewChoice:
    """What the two views and their conditions are made of; see LossParams and ConditionerParams.

    `condition` names what comes beside the latents: "pixels" or "latents" for the conditioner, or
    "labels" for a class table. Only pixels are decoded.
    """

    latent_views: str
    cond_view: str
    condition: str


@dataclass(frozen=True)
class PairedShards:
    """Two folders whose shards hold the same keys in the same order."""

    images: Path
    latents: Path
    split: str
    image_index: ShardIndex
    latent_index: ShardIndex

    @classmethod
    def open(cls, images: Path, latents: Path, *, split: str) -> "PairedShards":
        """Read both indices.

        Raises:
            ValueError: shards are missing or damaged, or the folders do not belong together.
        """
        image_index, latent_index = ShardIndex.read(images), ShardIndex.read(latents)
        counts = [
            [shard.num_samples for shard in index.shards(split)]
            for index in (image_index, latent_index)
        ]
        if counts[0] != counts[1]:
            msg = f"{latents}: made from other shards than {images}; run `dvc repro latents`"
            raise ValueError(msg)
        return cls(images, latents, split, image_index, latent_index)

    @property
    def num_shards(self) -> int:
        """Of the split."""
        return len(self.image_index.shards(self.split))

    @property
    def num_samples(self) -> int:
        """Of the split."""
        return self.image_index.num_samples(self.split)

    def read(self, number: int, *, with_images: bool = True) -> Iterator[Pair]:
        """Yield the pairs of one shard; without images, their half is empty and not read.

        Raises:
            ValueError: the two shards' keys differ.
        """
        image_shard = self.image_index.shards(self.split)[number]
        latent_shard = self.latent_index.shards(self.split)[number]
        latent_records = read_shard(self.latents / latent_shard.name, latent_shard)
        if not with_images:
            yield from (({}, latent) for latent in latent_records)
            return
        image_records = read_shard(self.images / image_shard.name, image_shard)
        for image, latent in zip(image_records, latent_records, strict=True):
            if image["__key__"] != latent["__key__"]:
                msg = (
                    f"{self.latents / latent_shard.name}: key {latent['__key__'].decode()} beside "
                    f"{image['__key__'].decode()}; run `dvc repro latents`"
                )
                raise ValueError(msg)
            yield image, latent


class TrainingStream(IterableDataset[dict[str, Tensor]]):
    """An endless stream of batches, fixed by the seed, that can start at any step.

    Each process and worker owns every n-th shard of a seeded order, which differs between epochs,
    shuffles in a buffer, and goes on with the next epoch when its shards are through: with one
    stream an epoch sees each image once; with several, streams of unequal length drift apart by
    less than a shard an epoch, and none is ever idle.
    """

    def __init__(
        self,
        pairs: PairedShards,
        *,
        choice: ViewChoice,
        batch_size: int,
        start_step: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        """Describe the stream; nothing is read yet, nor by a start in mid-run any earlier epoch.

        Args:
            pairs: images and latents.
            choice: how views and conditions are chosen.
            batch_size: images a step in this process.
            start_step: batches that an earlier run has consumed.
            seed: of order, views and crops.
            rank: this process's number.
            world_size: number of processes.

        Raises:
            ValueError: different views are asked for where only one was encoded.
        """
        super().__init__()
        if choice.latent_views == "two" and pairs.latent_index.facts["views"] < 2:
            msg = "loss.latent_views: two needs latents.views of 2 or more (same: one view does)"
            raise ValueError(msg)
        crops_of_latents = choice.condition == "latents" and choice.cond_view == "crop"
        if crops_of_latents and pairs.latent_index.facts["views"] < 2:
            msg = (
                "conditioner.cond_view: crop with conditioner.input latents draws from the stored "
                "views, and needs latents.views of 2 or more"
            )
            raise ValueError(msg)
        self.pairs, self.choice, self.batch_size = pairs, choice, batch_size
        self.start_step, self.seed, self.rank, self.world_size = start_step, seed, rank, world_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches; see `_collate` for their content."""
        worker = get_worker_info()
        num_workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        # The loader takes batches from its workers in turn, beginning with worker 0, also when it
        # starts in mid-run: so the stream that is next must be worker 0's.
        number = (number + self.start_step) % num_workers
        first = -(-(self.start_step - number) // num_workers)
        stream = self.rank * num_workers + number
        pairs = self._pairs(
            stream, self.world_size * num_workers, num_skipped=first * self.batch_size
        )
        while batch := list(islice(pairs, self.batch_size)):
            yield self._collate(batch)

    def _pairs(
        self, stream: int, num_streams: int, *, num_skipped: int
    ) -> Iterator[tuple[int, Pair]]:
        """Yield a stream's pairs, each with its epoch, without end; epochs skipped are not read."""
        assert num_streams <= self.pairs.num_shards, "training_batches refuses this"
        sizes = [shard.num_samples for shard in self.pairs.image_index.shards(self.pairs.split)]
        for epoch in count():
            order = np.random.default_rng([self.seed, epoch]).permutation(self.pairs.num_shards)
            shards = [int(shard) for shard in order[stream::num_streams]]
            num_samples = sum(sizes[shard] for shard in shards)
            if num_skipped < num_samples:
                rng = random.Random(f"{self.seed}/{epoch}/{stream}")
                for pair in islice(self._shuffled(shards, rng), num_skipped, None):
                    yield epoch, pair
            num_skipped = max(0, num_skipped - num_samples)

    def _shuffled(self, shards: Sequence[int], rng: random.Random) -> Iterator[Pair]:
        buffer: list[Pair] = []
        for shard in shards:
            for pair in self.pairs.read(shard, with_images=self.choice.condition != "latents"):
                buffer.append(pair)
                if len(buffer) > SHUFFLE_BUFFER:
                    yield _pop_random(buffer, rng)
        while buffer:
            yield _pop_random(buffer, rng)

    def _collate(self, batch: list[tuple[int, Pair]]) -> dict[str, Tensor]:
        """Stack to "moments" (2 batch 2c h w), float16, and what the choice's `condition` names.

        That is "conditions" (2 batch 3 s s), "condition_moments" (2 batch 2c h w) or "labels"
        (batch).
        """
        name = {"pixels": "conditions", "latents": "condition_moments", "labels": "labels"}
        chosen = [self._choose(epoch, pair) for epoch, pair in batch]
        moments = torch.stack([item[0] for item in chosen], dim=1)
        others = [item[1] for item in chosen]
        dim = 0 if self.choice.condition == "labels" else 1
        return {"moments": moments, name[self.choice.condition]: torch.stack(others, dim=dim)}

    def _choose(
        self, epoch: int, pair: Pair
    ) -> tuple[Float[Tensor, "2 moments h w"], Shaped[Tensor, "*shape"]]:
        """Two views of one image and what conditions them.

        The random numbers depend on the seed, the epoch and the key, not on who reads the image.
        """
        stored = StoredLatents.of_record(pair[1])
        rng = np.random.default_rng([self.seed, epoch, crc32(stored.key.encode())])
        num_views = len(stored.crops)
        if self.choice.latent_views == "same":
            first = second = int(rng.integers(num_views))
        else:
            first, second = 0, int(rng.integers(1, num_views))
        moments = torch.from_numpy(stored.moments)
        match self.choice.condition:
            case "pixels":
                condition = self._pixels(image_of(pair[0]), stored.crops[first], rng)
            case "latents" if self.choice.cond_view == "crop":
                condition = moments[rng.integers(num_views, size=2)]
            case "latents":
                condition = moments[[first, first]]
            case _:
                condition = torch.tensor(image_of(pair[0]).label)
        return moments[[first, second]], condition

    def _pixels(
        self, sample: Sample, crop: Crop, rng: np.random.Generator
    ) -> Float[Tensor, "2 3 s s"]:
        image = decode(sample.image, name=sample.key)
        facts = self.pairs.latent_index.facts
        size, crops = facts["image_size"], [crop] * 2
        if self.choice.cond_view == "crop":
            scale = facts["crop_scale_min"]
            crops = [random_crop(rng, *image.shape[1:], scale_min=scale) for _ in range(2)]
        return to_pixels(torch.stack([apply_crop(image, crop, size=size) for crop in crops]))


def training_batches(stream: TrainingStream, *, num_workers: int) -> Iterator[Mapping[str, Any]]:
    """Run the stream in worker processes (0: in this one).

    Raises:
        ValueError: there are fewer shards than streams.
    """
    num_streams = stream.world_size * max(1, num_workers)
    if num_streams > stream.pairs.num_shards:
        msg = (
            f"shard.samples_per_shard: {stream.pairs.num_shards} shards cannot feed {num_streams} "
            "streams (processes x runtime.num_workers); make smaller shards or use fewer streams"
        )
        raise ValueError(msg)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
    return iter(loader)


def stream_layout(*, world_size: int, num_workers: int) -> str:
    """What, besides the seed, decides the order of the data: kept beside a training's state."""
    return f"{world_size} x {max(1, num_workers)} data streams (processes x runtime.num_workers)"


def check_layout(layout: str, *, saved: str, state: Path) -> None:
    """Refuse to go on with another layout, which would repeat some images and leave out others.

    Raises:
        ValueError: names runtime.num_workers.
    """
    if saved != layout:
        msg = (
            f"runtime.num_workers: {state} was saved by a run of {saved}, this one has {layout}: "
            "it would repeat some images and leave out others. Use the same numbers, or delete "
            f"{state.parent} to begin anew"
        )
        raise ValueError(msg)


def _pop_random(buffer: list[Pair], rng: random.Random) -> Pair:
    index = rng.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()
