"""Training batches from image shards and latent shards, in a random order that a seed fixes.

Image shard i and latent shard i contain the same samples in the same order. So both give pairs of
an image and its latents. The pairs are shuffled, and `make_batch` stacks them into batches.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cached_property, partial
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from contradiff.data.order import ShardRange, TrainingOrder
from contradiff.data.remote import Location, join
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import ShardIndex, read_shard
from contradiff.signals import outlive_signals

Pair = tuple[dict[str, bytes], dict[str, bytes]]
"""The two records of one sample: the image file with its label, and the latents."""
MakeBatch = Callable[[int, Sequence[Pair]], dict[str, Tensor]]
"""A function that gets the epoch's number and some pairs, and stacks the pairs into a batch."""


@dataclass(frozen=True)
class PairedShards:
    """Image shards and latent shards, in two folders, with the same samples in the same order."""

    images: Location
    latents: Location
    split: str
    image_index: ShardIndex[ImageInfo]
    latent_index: ShardIndex[LatentInfo]

    @classmethod
    def open(cls, images: Location, latents: Location, *, split: str) -> "PairedShards":
        """Read both indices. A location is a local folder or a URL (s3://, gs://, http://, ...).

        Raises ValueError if shards are missing or damaged, or if the two folders do not match.
        """
        image_index = ShardIndex.read(images, ImageInfo)
        latent_index = ShardIndex.read(latents, LatentInfo)
        pairs = cls(images, latents, split, image_index, latent_index)
        if pairs.sizes != tuple(shard.num_samples for shard in latent_index.shards(split)):
            what = f"made from other shards than {images}"
            raise ValueError(f"{latents}: {what}; run `dvc repro latents`")
        return pairs

    @property
    def num_shards(self) -> int:
        """Number of shards of the split."""
        return len(self.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples of each shard."""
        return tuple(shard.num_samples for shard in self.image_index.shards(self.split))

    @property
    def num_samples(self) -> int:
        """Number of samples of the split."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """A hash of the split's content, which does not change if the folders are moved."""
        content = [
            [[asdict(shard) for shard in index.shards(self.split)], index.info.model_dump()]
            for index in (self.image_index, self.latent_index)
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def read_range(self, wanted: ShardRange, *, with_images: bool) -> Iterator[Pair]:
        """Yield some pairs of a shard. The pairs before them are read, but not yielded."""
        # `read_shard` checks a shard after its last sample. Do not stop before that check.
        stop = None if wanted.last == self.sizes[wanted.shard] else wanted.last
        yield from islice(self.read(wanted.shard, with_images=with_images), wanted.first, stop)

    def read(self, number: int, *, with_images: bool = True) -> Iterator[Pair]:
        """Yield the pairs of one shard. Without `with_images`, the image records are empty."""
        image_shard = self.image_index.shards(self.split)[number]
        latent_shard = self.latent_index.shards(self.split)[number]
        latent_records = read_shard(join(self.latents, latent_shard.name), latent_shard)
        if not with_images:
            yield from (({}, latent) for latent in latent_records)
            return
        image_records = read_shard(join(self.images, image_shard.name), image_shard)
        for image, latent in zip(image_records, latent_records, strict=True):
            if image["__key__"] != latent["__key__"]:
                keys = ", but the image has the key ".join(
                    record["__key__"].decode() for record in (latent, image)
                )
                path = join(self.latents, latent_shard.name)
                raise ValueError(f"{path}: the latent has the key {keys}; run `dvc repro latents`")
            yield image, latent


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
