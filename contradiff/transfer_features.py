"""Features of a transfer set, each process computing a part: images by row => features by row."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from contradiff.data.transfer_set import TransferSplit
from contradiff.extraction import CleanBatch, FeatureSet, encoded_batches

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


def share_of(num_rows: int, *, batch_size: int, rank: int, num_processes: int) -> range:
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
    vae: "AutoencoderKL",
    images: TransferSplit,
    rows: Sequence[int],
    *,
    share: range,
    image_size: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[CleanBatch]:
    """Yield some rows of a split, encoded; images are read a batch at a time.

    Args:
        vae: on `device`.
        images: the split.
        rows: of the split, those that are featured by all processes together. An image's noise is
            seeded by its place among them.
        share: the places in `rows` that are yielded, from `share_of`.
        image_size: side of the model's pixels.
        batch_size: images at once.
        device: where the VAE runs.
    """
    for start in range(share.start, share.stop, batch_size):
        chosen = list(rows[start : min(start + batch_size, share.stop)])
        for batch in encoded_batches(
            vae,
            torch.from_numpy(images.read(chosen)),
            torch.from_numpy(images.labels[chosen]),
            image_size=image_size,
            batch_size=batch_size,
            device=device,
        ):
            keys = tuple(images.keys[row] for row in chosen)
            yield replace(batch, first_index=start, keys=keys)


def gather_features(part: FeatureSet | None) -> FeatureSet:
    """Join the shares of all processes, in order; each gets all. None: this one had nothing."""
    from accelerate.utils import gather_object

    parts: list[FeatureSet] = gather_object([] if part is None else [part])
    return FeatureSet(
        torch.cat([each.features for each in parts]),
        torch.cat([each.labels for each in parts]),
        tuple(key for each in parts for key in each.keys),
    )
