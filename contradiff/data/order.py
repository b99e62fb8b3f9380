"""The order of training samples. It does not depend on the number of processes or workers.

In each epoch, the shards are joined in a random order to one sequence of samples. The sequence is
cut into streams, and each stream shuffles its samples in a buffer. A stream fills some rows of a
batch (a row group) in some of the steps (a step group). With 2 row groups and 2 step groups there
are 4 streams, A to D:

              step 0   step 1   step 2   step 3
    rows 0-3     A        B        A        B
    rows 4-7     C        D        C        D

So a process reads only the streams of its rows, and a worker only the streams of its steps. Each
shard is read once or twice in an epoch, if there are at least 64 shards, and if the number of
processes and the number of workers per process are in `GROUPS`.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

GROUPS = (1, 2, 4, 8)
"""Possible numbers of row groups, and of step groups."""
SHUFFLE_BUFFER = 32768
"""Number of samples in the buffers of all streams together. (Shards are already shuffled.)"""

Item = TypeVar("Item")


@dataclass(frozen=True)
class ShardRange:
    """The samples `first` to `last - 1` of the shard with the number `shard`."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class TrainingOrder:
    """The order in which a training reads samples.

    `sizes` has the number of samples of each shard. `batch_size` counts the samples of all
    processes. An epoch uses no sample twice. If the last samples do not fill a batch, the epoch
    leaves them out. These samples differ between epochs.
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
        """Number of streams from which one batch is made; a divisor of `batch_size`."""
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
        """Yield each row group of a process, and which rows of this group the process reads."""
        assert self.batch_size % world_size == 0, "every process must have the same number of rows"
        own, height = self.batch_size // world_size, self.rows_per_group
        first, last = rank * own, (rank + 1) * own
        for group in range(first // height, -(-last // height)):
            top = group * height
            yield group, range(max(first - top, 0), min(last - top, height))

    def ranges(self, *, epoch: int, row_group: int, step_group: int) -> list[ShardRange]:
        """Return the ranges of shards that one stream reads in an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        steps, groups = self.steps_per_epoch, self.num_step_groups
        # Number of steps in each step group. The first groups may have one step more.
        steps_of = [-(-(steps - group) // groups) for group in range(groups)]
        before = row_group * steps + sum(steps_of[:step_group])
        after = before + steps_of[step_group]
        # A stream gets samples in proportion to its steps. So equally large shards are rarely cut.
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
        """Shuffle the items of a stream: draw each item at random from a buffer of next items."""
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
