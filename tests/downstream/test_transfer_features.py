"""The processes' shares are the whole, batch by batch."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contradiff.base.loading import load_vae
from contradiff.downstream.transfer_features import (
    batch_share_of,
    gather_features,
    transfer_batches,
)
from contradiff.features.extraction import CleanBatch, FeatureSet, encoded_batches
from contradiff.sources.transfer_set import TransferSplit

CPU = torch.device("cpu")


@given(
    num_rows=st.integers(0, 200),
    batch_size=st.integers(1, 50),
    num_processes=st.integers(1, 9),
)
def test_shares_are_the_whole_in_whole_batches(num_rows: int, batch_size: int, num_processes: int):
    shares = [
        batch_share_of(num_rows, batch_size=batch_size, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    assert [row for share in shares for row in share] == list(range(num_rows))
    assert all(share.start % batch_size == 0 for share in shares if share)
    counts = [-(-len(share) // batch_size) for share in shares]
    assert max(counts) - min(counts) <= 1


@pytest.fixture
def split() -> TransferSplit:
    images = np.random.default_rng(0).integers(0, 256, (11, 3, 32, 32), dtype=np.uint8)
    return TransferSplit(
        labels=np.arange(11) % 3,
        keys=tuple(f"image-{row}" for row in range(11)),
        class_names=("a", "b", "c"),
        read=lambda rows: images[list(rows)],
    )


def equal(ours: list[CleanBatch], expected: list[CleanBatch]) -> bool:
    return len(ours) == len(expected) and all(
        a.latents.equal(b.latents) and a.pixels.equal(b.pixels) and a.labels.equal(b.labels)
        for a, b in zip(ours, expected, strict=True)
    )


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_batches_do_not_depend_on_the_processes(
    tiny_base: Path, split: TransferSplit, num_processes: int
):
    """To the last bit those of all images at once; each image is read by one process."""
    vae = load_vae(tiny_base)
    rows = [10, 0, 3, 4, 5, 6, 9, 1]
    encode = partial(encoded_batches, vae, image_size=32, batch_size=3, device=CPU)
    images = torch.from_numpy(split.read(rows))
    expected = list(encode(images, torch.from_numpy(split.labels[rows])))
    ours = [
        batch
        for rank in range(num_processes)
        for batch in transfer_batches(
            encode,
            split,
            rows,
            share=batch_share_of(len(rows), batch_size=3, rank=rank, num_processes=num_processes),
            batch_size=3,
        )
    ]
    assert equal(ours, expected)
    assert [key for batch in ours for key in batch.keys] == [f"image-{row}" for row in rows]
    # the noise is of the row in the split, whatever other rows are used
    assert [index for batch in ours for index in batch.indices] == rows


def test_one_process_gathers_its_own():
    part = FeatureSet(torch.randn(4, 2), torch.arange(4), ("a", "b", "c", "d"))
    whole = gather_features(part)
    assert whole.features.equal(part.features)
    assert (whole.labels.tolist(), whole.keys) == ([0, 1, 2, 3], part.keys)
