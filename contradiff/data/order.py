"""Who reads which sample: exact cuts of a split's shards, and the order of a training's data.

sizes of the shards => 1 to 64 streams, whose samples make up every global batch
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np

MAX_LANES, MAX_PHASES = 8, 8
"""Up to 8 processes and up to 8 workers of each read no shard that another reads, but at cuts."""
SHUFFLE_BUFFER = 32768
"""Samples held while shuffling, by all streams together; shards are shuffled when written."""


ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Part:
    """Samples `first` to `last - 1` of a shard."""

    shard: int
    first: int
    last: int


def share_of(num_samples: int, *, rank: int, world_size: int) -> range:
    """The consecutive samples of one process: disjoint, complete, equal but for one sample."""
    return range(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)


def parts_of(sizes: Sequence[int], samples: range, *, order: Sequence[int]) -> list[Part]:
    """Where consecutive samples lie, if shards are laid end to end.

    Args:
        sizes: samples of each shard.
        samples: a range of step 1.
        order: the shards' numbers, as they are laid.
    """
    ends = accumulate(sizes[shard] for shard in order)
    parts = [
        Part(
            shard,
            max(samples.start - (end - sizes[shard]), 0),
            min(samples.stop - (end - sizes[shard]), sizes[shard]),
        )
        for shard, end in zip(order, ends, strict=True)
    ]
    return [part for part in parts if part.first < part.last]


@dataclass(frozen=True)
class TrainingOrder:
    """The order of a training's samples: the same whatever processes and workers share the reading.

    An epoch's shards are laid end to end in a seeded order and cut into one range of samples for
    each stream; a stream shuffles its range in a buffer. Row i of every global batch belongs to
    lane i // rows_per_lane, and step s of the epoch takes it from that lane's stream s mod phases:
    so a process needs only the streams of its rows, and a worker only those of its steps.

    An epoch has num_samples // batch_size steps, with no sample twice; what is over is left out,
    other samples in every epoch.

    Attributes:
        sizes: samples of each shard.
        batch_size: images a step, over all processes.
        seed: of the order.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return sum(self.sizes) // self.batch_size

    @property
    def num_lanes(self) -> int:
        """How many streams feed one batch: a power of two that divides it."""
        lanes = 1
        most = min(MAX_LANES, len(self.sizes))
        while 2 * lanes <= most and self.batch_size % (2 * lanes) == 0:
            lanes *= 2
        return lanes

    @property
    def num_phases(self) -> int:
        """How many steps in a row are fed by different streams."""
        phases = 1
        while phases < MAX_PHASES and 2 * phases * self.num_lanes <= len(self.sizes):
            phases *= 2
        return phases

    @property
    def rows_per_lane(self) -> int:
        """Consecutive rows of a batch from one stream."""
        return self.batch_size // self.num_lanes

    def rows_of(self, *, rank: int, world_size: int) -> Iterator[tuple[int, range]]:
        """Yield a process's lanes, in its rows' order, and which of each lane's rows are its own.

        Args:
            rank: the process's number.
            world_size: number of processes; divides the batch.
        """
        assert self.batch_size % world_size == 0, "a process has as many rows as every other"
        mine = share_of(self.batch_size, rank=rank, world_size=world_size)
        height = self.rows_per_lane
        for lane in range(mine.start // height, -(-mine.stop // height)):
            top = lane * height
            yield lane, range(max(mine.start - top, 0), min(mine.stop - top, height))

    def parts(self, *, epoch: int, lane: int, phase: int) -> list[Part]:
        """What a stream reads in an epoch: at least the samples that its turns take."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        steps, phases = self.steps_per_epoch, self.num_phases
        # turns are steps in which a stream is asked; early phases may have one more
        before = lane * steps + sum(-(-(steps - p) // phases) for p in range(phase))
        after = before + -(-(steps - phase) // phases)
        # the range is cut in proportion to the turns, so that equal shards are not cut at all
        num_samples, turns = sum(self.sizes), steps * self.num_lanes
        samples = range(before * num_samples // turns, after * num_samples // turns)
        return parts_of(self.sizes, samples, order=[int(shard) for shard in order])

    def shuffled(
        self, items: Iterable[ItemT], *, epoch: int, lane: int, phase: int
    ) -> Iterator[ItemT]:
        """Yield a stream's items, each a random one of those that a buffer holds."""
        rng = random.Random(f"{self.seed}/{epoch}/{lane}/{phase}")
        size = max(1, SHUFFLE_BUFFER // (self.num_lanes * self.num_phases))
        buffer: list[ItemT] = []
        for item in items:
            buffer.append(item)
            if len(buffer) > size:
                yield _pop_random(buffer, rng)
        while buffer:
            yield _pop_random(buffer, rng)


def _pop_random(buffer: list[ItemT], rng: random.Random) -> ItemT:
    index = rng.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()
