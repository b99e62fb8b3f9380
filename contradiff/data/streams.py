"""Training batches from image shards and latent shards, in a random order that a seed fixes.

The pairs of an image and its latents are shuffled, and `make_batch` stacks them into batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from contradiff.data.order import TrainingOrder
from contradiff.data.pairs import Pair, PairedShards
from contradiff.signals import outlive_signals

MakeBatch = Callable[[int, Sequence[Pair]], dict[str, Tensor]]
"""A function that gets the epoch's number and some pairs, and stacks the pairs into a batch."""


@dataclass(eq=False)
class TrainingStream(IterableDataset["dict[str, Tensor] | Exception"]):
    """An endless stream of the batches of one process, from the step `start_step` on.

    `batch_size` counts the samples of this process. `TrainingOrder` decides the order of samples,
    which does not depend on the number of processes or workers. Epochs before `start_step` are not
    read. `make_batch` runs in the workers and must be picklable. Raises ValueError if the split has
    fewer images than a batch of all processes.
    """

    pairs: PairedShards
    _: KW_ONLY
    make_batch: MakeBatch
    with_images: bool
    batch_size: int
    start_step: int
    seed: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        pairs, batch_size = self.pairs, self.batch_size * self.world_size
        self.order = TrainingOrder(pairs.sizes, batch_size, self.seed)
        if self.order.steps_per_epoch == 0:
            has = f"split {pairs.split!r} has {pairs.num_samples} images, fewer than a batch"
            raise ValueError(f"{pairs.images}: {has} of {batch_size}; lower batch_size")

    def __iter__(self) -> Iterator[dict[str, Tensor] | Exception]:
        """Yield batches. An error is yielded too: a worker that raises would print a traceback."""
        worker = get_worker_info()
        # The loader takes batches from its workers in turn, beginning with worker 0.
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for epoch, pairs in self._batches(self.start_step + number, num_workers):
                yield self.make_batch(epoch, pairs)
        except (ValueError, OSError) as error:
            yield error

    def _batches(self, first_step: int, stride: int) -> Iterator[tuple[int, list[Pair]]]:
        """For every `stride`-th step, yield the epoch and the pairs of the batch."""
        order, height = self.order, self.order.rows_per_group
        rows = list(order.rows_of(rank=self.rank, world_size=self.world_size))
        streams: dict[tuple[int, int, int], tuple[Iterator[Pair], int]] = {}
        for step in count(first_step, stride):
            epoch, within = divmod(step, order.steps_per_epoch)
            earlier_steps, step_group = divmod(within, order.num_step_groups)
            streams = {key: stream for key, stream in streams.items() if key[0] == epoch}
            batch: list[Pair] = []
            for row_group, own in rows:
                key = epoch, row_group, step_group
                stream, position = streams.get(key) or (self._read(*key), 0)
                start = earlier_steps * height + own.start
                assert start >= position, "a stream cannot go back"
                taken = list(islice(stream, start - position, start - position + len(own)))
                assert len(taken) == len(own), "a stream has enough samples for its steps"
                streams[key] = stream, start + len(own)
                batch += taken
            yield epoch, batch

    def _read(self, epoch: int, row_group: int, step_group: int) -> Iterator[Pair]:
        place = {"epoch": epoch, "row_group": row_group, "step_group": step_group}
        read = partial(self.pairs.read_range, with_images=self.with_images)
        pairs = chain.from_iterable(map(read, self.order.ranges(**place)))
        return self.order.shuffled(pairs, **place)


def training_batches(stream: TrainingStream, *, num_workers: int) -> Iterator[Mapping[str, Any]]:
    """Run the stream in worker processes. Their number does not change the batches.

    Reading is fastest with at least 64 shards and 1, 2, 4 or 8 workers: then few shards are read
    more than once in an epoch. Raises ValueError if data are damaged, and OSError if a server
    cannot be reached.
    """
    pinned = torch.cuda.is_available()
    loader = DataLoader(
        stream,
        None,
        num_workers=num_workers,
        pin_memory=pinned,
        worker_init_fn=outlive_signals,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
