"""Features of a transfer set, each process computing a part: images by row => features by row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor

from contradiff.features.extraction import CleanBatch, FeatureSet
from contradiff.sources.transfer_set import TransferSplit
from contradiff.types import ByteImages

Encode: TypeAlias = Callable[[ByteImages, Int64[Tensor, " n"]], Iterator[CleanBatch]]
"""Makes one batch of square images in memory and their classes, as the feature model wants it."""


def batch_share_of(num_rows: int, *, batch_size: int, rank: int, num_processes: int) -> range:
    """The rows that one process computes: whole batches, as a single process would form them.

    So a row's feature does not depend on the number of processes, not even in its last bit.

    Args:
        num_rows: of all processes.
        batch_size: rows of a batch; the last may be smaller.
        rank: the process, from 0.
        num_processes: all of them; with fewer batches some have nothing.
    """
    num_batches = -(-num_rows // batch_size)
    first, last = (number * num_batches // num_processes for number in (rank, rank + 1))
    return range(min(first * batch_size, num_rows), min(last * batch_size, num_rows))


def transfer_batches(
    encode: Encode,
    images: TransferSplit,
    rows: Sequence[int],
    *,
    share: range,
    batch_size: int,
) -> Iterator[CleanBatch]:
    """Yield some rows of a split, encoded; images are read a batch at a time.

    Args:
        encode: makes a batch of images.
        images: the split.
        rows: of the split, those that are featured by all processes together. An image's noise is
            seeded by its row in the split, so that it does not depend on the others.
        share: the places in `rows` that are yielded, from `batch_share_of`.
        batch_size: images at once.
    """
    for start in range(share.start, share.stop, batch_size):
        chosen = list(rows[start : min(start + batch_size, share.stop)])
        pixels, labels = images.read(chosen), images.labels[chosen]
        for batch in encode(torch.from_numpy(pixels), torch.from_numpy(labels)):
            keys = tuple(images.keys[row] for row in chosen)
            yield replace(batch, indices=tuple(chosen), keys=keys)


def gather_features(part: FeatureSet | None) -> FeatureSet:
    """Join the shares of all processes, in order; each gets all. None: this one had nothing."""
    from accelerate.utils import gather_object

    parts: list[FeatureSet] = gather_object([] if part is None else [part])
    return FeatureSet(
        torch.cat([each.features for each in parts]),
        torch.cat([each.labels for each in parts]),
        tuple(key for each in parts for key in each.keys),
    )
