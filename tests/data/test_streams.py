"""Every image in its turn, whoever reads it and wherever one starts."""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.data import order
from contradiff.data.latents import StoredLatents
from contradiff.data.order import ShardRange
from contradiff.data.pairs import PairedShards
from contradiff.data.shard_info import ShardInfo
from contradiff.data.shards import ShardIndex, read_split, write_split
from contradiff.data.streams import TrainingStream, training_batches
from contradiff.data.transforms import decode
from contradiff.signals import STOPPING
from contradiff.training import batch as views_of_a_batch
from contradiff.training.batch import ViewChooser

NUM_IMAGES = 24


@pytest.fixture
def pairs(tiny_data: Path) -> PairedShards:
    return PairedShards.open(tiny_data / "images", tiny_data / "latents", split="train")


def stream_of(pairs: PairedShards, **changes: Any) -> TrainingStream:
    views = {"latent_views": "two", "cond_view": "crop", "condition": "pixels", "seed": 0}
    settings: dict[str, Any] = {"make_batch": ViewChooser(pairs, **views), "with_images": True}
    settings |= {"batch_size": 4, "start_step": 0, "seed": 0, "rank": 0, "world_size": 1}
    return TrainingStream(pairs, **(settings | changes))


def batches_of(
    pairs: PairedShards, number: int, *, num_workers: int = 0, **changes: Any
) -> list[dict[str, Tensor]]:
    batches = training_batches(stream_of(pairs, **changes), num_workers=num_workers)
    return list(map(dict, islice(batches, number)))


@pytest.fixture(scope="module")
def views(tiny_data: Path) -> dict[bytes, tuple[str, int]]:
    """Which image's which view some moments are."""
    stored = map(StoredLatents.of_record, read_split(tiny_data / "latents", "train"))
    found = {
        moments.tobytes(): (item.key, view)
        for item in stored
        for view, moments in enumerate(item.moments)
    }
    assert len(found) == 3 * NUM_IMAGES
    return found


Views = dict[bytes, tuple[str, int]]


def shown(batch: dict[str, Tensor], views: Views) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Image and view of each pair of moments."""
    first, second = batch["moments"].numpy()
    return [(views[a.tobytes()], views[b.tobytes()]) for a, b in zip(first, second, strict=True)]


def keys(batches: list[dict[str, Tensor]], views: Views) -> list[str]:
    return [first[0] for batch in batches for first, _ in shown(batch, views)]


@pytest.mark.parametrize(("buffer", "batch_size"), [(3, 4), (32768, 4), (32768, 5)])
def test_an_epoch_sees_every_image_once_but_what_fills_no_batch(
    pairs: PairedShards, views: Views, monkeypatch: Any, buffer: int, batch_size: int
):
    """What is left out differs between epochs."""
    monkeypatch.setattr(order, "SHUFFLE_BUFFER", buffer)
    taken = NUM_IMAGES // batch_size * batch_size
    seen = keys(batches_of(pairs, 3 * taken // batch_size, batch_size=batch_size), views)
    epochs = [seen[start : start + taken] for start in (0, taken, 2 * taken)]
    assert [len(set(epoch)) for epoch in epochs] == [taken] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({frozenset(epoch) for epoch in epochs}) == (1 if taken == NUM_IMAGES else 3)


@pytest.mark.parametrize("start_step", [1, 5, 6, 7, 13])
@pytest.mark.parametrize("batch_size", [4, 7])
def test_stream_goes_on_where_it_was_left(pairs: PairedShards, start_step: int, batch_size: int):
    whole = batches_of(pairs, 16, batch_size=batch_size)
    rest = batches_of(pairs, 16 - start_step, batch_size=batch_size, start_step=start_step)
    for batch, other in zip(rest, whole[start_step:], strict=True):
        assert all(batch[name].equal(other[name]) for name in other)


def test_start_in_mid_run_reads_no_earlier_epoch_and_decodes_nothing_that_it_skips(
    pairs: PairedShards, monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    decoded: list[str] = []
    real = PairedShards.read

    def counting(self: PairedShards, number: int, **keywords: bool) -> Iterator[Any]:
        read.append(number)
        return real(self, number, **keywords)

    def decoding(encoded: bytes, *, name: str) -> Tensor:
        decoded.append(name)
        return decode(encoded, name=name)

    monkeypatch.setattr(PairedShards, "read", counting)
    monkeypatch.setattr(views_of_a_batch, "decode", decoding)
    batches_of(pairs, 1, start_step=6 * 1000 + 5)
    assert (sorted(read), len(decoded)) == ([0, 1, 2, 3], 4)


def rewritten(
    source: Path, folder: Path, samples_per_shard: int, change: Callable[[list[Any]], Any] = list
) -> Path:
    """A copy of a folder's training split, changed."""
    records = change(list(read_split(source, "train")))
    size = {"samples_per_shard": samples_per_shard, "compression": "none"}
    shards = write_split(folder, "train", records, **size)
    ShardIndex({"train": shards}, ShardIndex.read(source, ShardInfo).info).write(folder)
    return folder


def test_folders_of_other_sizes_are_refused(tiny_data: Path, tmp_path: Path):
    latents = rewritten(tiny_data / "latents", tmp_path / "latents", 8)
    with pytest.raises(ValueError, match=r"latents: made from other shards than .*images; run"):
        PairedShards.open(tiny_data / "images", latents, split="train")


def test_folders_of_other_orders_are_refused(tiny_data: Path, tmp_path: Path):
    latents = rewritten(tiny_data / "latents", tmp_path / "latents", 6, reversed)
    pairs = PairedShards.open(tiny_data / "images", latents, split="train")
    with pytest.raises(
        ValueError,
        match=r"train-0000\d.tar: the latent has the key train-\d+, but the image .*train-\d+; run",
    ):
        batches_of(pairs, 1)


@pytest.fixture(scope="module")
def uneven(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PairedShards:
    """The same images in shards of 7, 7, 7 and 3."""
    folders = [
        rewritten(tiny_data / name, tmp_path_factory.mktemp(name), 7)
        for name in ("images", "latents")
    ]
    return PairedShards.open(*folders, split="train")


def global_batches(pairs: PairedShards, number: int, *, world_size: int, **who: int) -> list[bytes]:
    """All rows of all processes, moments and conditions, as bytes."""
    size = {"batch_size": 6 // world_size, "world_size": world_size}
    of_ranks = [batches_of(pairs, number, rank=rank, **size, **who) for rank in range(world_size)]
    return [
        b"".join(
            torch.cat([batch[name] for batch in batches], dim=1).numpy().tobytes()
            for name in ("moments", "conditions")
        )
        for batches in zip(*of_ranks, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(
    ("folder", "num_workers", "world_size"),
    [
        *[("pairs", 2, 2), ("pairs", 0, 3), ("uneven", 1, 1), ("uneven", 2, 1)],
        *[("uneven", 5, 1), ("uneven", 0, 2), ("uneven", 2, 3), ("uneven", 0, 6)],
    ],
)
def test_batches_do_not_depend_on_who_reads_them(
    request: pytest.FixtureRequest, folder: str, num_workers: int, world_size: int
):
    """An epoch has 4 steps of 6; begun in mid-epoch, too."""
    pairs = request.getfixturevalue(folder)
    expected = global_batches(pairs, 7, num_workers=0, world_size=1)
    assert len(set(expected)) == 7
    assert global_batches(pairs, 7, num_workers=num_workers, world_size=world_size) == expected
    rest = global_batches(pairs, 2, num_workers=num_workers, world_size=world_size, start_step=5)
    assert rest == expected[5:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_named_in_one_line(
    tiny_data: Path, pairs: PairedShards, tmp_path: Path, num_workers: int
):
    def spoil(records: list[Any]) -> list[Any]:
        records[7]["png"] = b"no image"
        return records

    images = rewritten(tiny_data / "images", tmp_path, 6, spoil)
    spoilt = PairedShards.open(images, pairs.latents, split="train")
    with pytest.raises(ValueError, match=r"^train-007: not a readable image") as caught:
        batches_of(spoilt, 6, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_more_images_a_batch_than_there_are_are_refused(pairs: PairedShards):
    with pytest.raises(ValueError, match=r"has 24 images, fewer than a batch of 26"):
        stream_of(pairs, batch_size=13, world_size=2)


def test_a_damaged_shard_is_noticed_before_its_first_sample(pairs: PairedShards, tmp_path: Path):
    copy = tmp_path / "images"
    shutil.copytree(pairs.images, copy)
    path = copy / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    damaged = replace(pairs, images=copy)
    with pytest.raises(ValueError, match=r"train-00001\.tar: damaged"):
        next(iter(damaged.read_range(ShardRange(1, 0, 5), with_images=True)))


def test_digest_is_of_the_content_wherever_it_lies(
    pairs: PairedShards, uneven: PairedShards, tiny_data: Path, tmp_path: Path
):
    shutil.copytree(tiny_data / "images", tmp_path / "elsewhere")
    moved = PairedShards.open(tmp_path / "elsewhere", pairs.latents, split="train")
    assert moved.digest == pairs.digest != uneven.digest


def test_without_images_their_shards_are_not_read(
    pairs: PairedShards, views: Views, tmp_path: Path
):
    without_images = replace(pairs, images=tmp_path / "nothing")
    settings = {"latent_views": "two", "cond_view": "same", "condition": "latents", "seed": 0}
    chooser = ViewChooser(pairs, **settings)
    seen = keys(batches_of(without_images, 6, make_batch=chooser, with_images=False), views)
    assert len(set(seen)) == NUM_IMAGES


def test_a_worker_serves_the_step_in_hand_if_a_signal_reaches_the_whole_group(pairs: PairedShards):
    before = set(multiprocessing.active_children())
    batches = training_batches(stream_of(pairs), num_workers=1)
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    for number in STOPPING:
        os.kill(worker.pid, number)
    assert len(list(islice(batches, 12))) == 12
