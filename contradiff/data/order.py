"""The order of a training's samples: the same, whichever processes and workers share the reading.

An epoch's shards are laid end to end in a seeded order and cut into ranges of samples, one for
each stream. A stream shuffles its range in a buffer. Every batch takes its rows from several
streams, and consecutive steps take theirs from different ones. With 2 row groups and 2 step groups
there are 4 streams:

              step 0   step 1   step 2   step 3
    rows 0-3     A        B        A        B
    rows 4-7     C        D        C        D

So a process reads only the streams of its rows, and each of its workers only those of its steps.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

GROUPS = (1, 2, 4, 8)
"""Up to 8 processes with up to 8 workers each read no shard twice, except where it is cut."""
SHUFFLE_BUFFER = 32768
"""Samples held while shuffling, by all streams together; shards are shuffled when written."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class ShardRange:
    """Samples `first` to `last - 1` of a shard."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class TrainingOrder:
    """The order of a training's samples.

    `sizes` are the shards' numbers of samples, `batch_size` is that of all processes together. An
    epoch has num_samples // batch_size steps and takes no sample twice. It leaves out the samples
    that would not fill a batch, different ones in every epoch.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return sum(self.sizes) // self.batch_size

    @property
    def num_row_groups(self) -> int:
        """Number of streams that make up one batch, a divisor of `batch_size`."""
        return max(n for n in GROUPS if n <= max(1, len(self.sizes)) and self.batch_size % n == 0)

    @property
    def num_step_groups(self) -> int:
        """Number of steps after which the same streams are read again."""
        return max(n for n in GROUPS if n == 1 or n * self.num_row_groups <= len(self.sizes))

    @property
    def rows_per_group(self) -> int:
        """Number of consecutive rows of a batch that come from one stream."""
        return self.batch_size // self.num_row_groups

    def rows_of(self, *, rank: int, world_size: int) -> Iterator[tuple[int, range]]:
        """Yield a process's row groups, in order, and which rows of each group are its own."""
        assert self.batch_size % world_size == 0, "a process has as many rows as every other"
        own, height = self.batch_size // world_size, self.rows_per_group
        first, last = rank * own, (rank + 1) * own
        for group in range(first // height, -(-last // height)):
            top = group * height
            yield group, range(max(first - top, 0), min(last - top, height))

    def ranges(self, *, epoch: int, row_group: int, step_group: int) -> list[ShardRange]:
        """Return the ranges that a stream reads in an epoch, enough samples for its steps."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        steps, groups = self.steps_per_epoch, self.num_step_groups
        # Steps that take from each stream; the first step groups may have one more.
        steps_of = [-(-(steps - group) // groups) for group in range(groups)]
        before = row_group * steps + sum(steps_of[:step_group])
        after = before + steps_of[step_group]
        # The cuts are in proportion to the steps, so that equal shards are not cut at all.
        num_samples, all_steps = sum(self.sizes), steps * self.num_row_groups
        samples = range(before * num_samples // all_steps, after * num_samples // all_steps)
        place, found = 0, list[ShardRange]()
        for shard, size in ((shard, self.sizes[shard]) for shard in order.tolist()):
            first, last = max(samples.start - place, 0), min(samples.stop - place, size)
            if first < last:
                found.append(ShardRange(shard, first, last))
            place += size
        return found

    def shuffled(
        self, items: Iterable[Item], *, epoch: int, row_group: int, step_group: int
    ) -> Iterator[Item]:
        """Yield a stream's items in random order: each one is drawn from a buffer."""
        rng = random.Random(f"{self.seed}/{epoch}/{row_group}/{step_group}")
        size = max(1, SHUFFLE_BUFFER // (self.num_row_groups * self.num_step_groups))
        buffer: list[Item] = []
        for item in items:
            buffer.append(item)
            if len(buffer) > size:
                yield _pop_random(buffer, rng)
        while buffer:
            yield _pop_random(buffer, rng)


def _pop_random(buffer: list[Item], rng: random.Random) -> Item:
    index = rng.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()
