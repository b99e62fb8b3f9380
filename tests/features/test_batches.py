"""Batches have the centre crops of the images, in order."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contradiff.base.loading import load_vae
from contradiff.data.latents import StoredLatents
from contradiff.data.shards import image_of, read_images, read_split
from contradiff.data.transforms import apply_crop, centre_crop, decode
from contradiff.features import batches as module
from contradiff.features.batches import CleanBatch, StoredImages, stored_batches
from contradiff.types import to_pixels


def batches_of(tiny_data: Path, *, split: str = "train", batch_size: int = 24) -> list[CleanBatch]:
    folders = tiny_data / "images", tiny_data / "latents"
    return list(stored_batches(*folders, split=split, batch_size=batch_size))


def test_stored_batches_are_the_split_s_centre_crops_in_order(tiny_data: Path):
    batches = batches_of(tiny_data, batch_size=10)
    assert [len(batch.keys) for batch in batches] == [10, 10, 4]
    assert [i for batch in batches for i in batch.indices] == list(range(24))
    folders = tiny_data / "images", tiny_data / "latents"
    rows = ((b.keys[i], b.labels[i], b.pixels[i], b.latents[i]) for b in batches for i in range(10))
    stored = zip(*(read_split(folder, "train") for folder in folders), strict=True)
    for (image, latent), (key, label, pixels, mean) in zip(stored, rows, strict=False):
        sample, moments = image_of(image), StoredLatents.of_record(latent).moments
        assert (key, label) == (sample.key, sample.label)
        shown = apply_crop(decode(sample.image, name=""), centre_crop(40, 36), size=32)
        assert pixels.equal(to_pixels(shown[None])[0])
        # tiny_base's scaling factor is 0.5
        assert mean.equal(0.5 * torch.from_numpy(moments[0, :4]).float())


def test_chosen_batches_are_those_images(tiny_data: Path):
    folders = tiny_data / "images", tiny_data / "latents"
    (whole,) = batches_of(tiny_data)
    chosen = [0, 1, 5, 6, 13, 22, 23]
    batches = list(stored_batches(*folders, split="train", batch_size=3, chosen=chosen))
    assert [batch.indices for batch in batches] == [(0, 1, 2), (3, 4, 5), (6,)]
    for name in ("latents", "pixels", "labels"):
        found = torch.cat([getattr(batch, name) for batch in batches])
        assert found.equal(getattr(whole, name)[chosen])
    keys = tuple(key for batch in batches for key in batch.keys)
    assert keys == tuple(whole.keys[index] for index in chosen)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_a_shard_s_batches_are_its_rows_of_the_split(tiny_data: Path, num_threads: int):
    images = StoredImages(tiny_data / "images", tiny_data / "latents", 4, num_threads)
    assert images.shards == [*(("train", n) for n in range(4)), ("val", 0), ("val", 1)]
    batches = list(images.latent_batches("train", 1, with_pixels=True))
    expected = batches_of(tiny_data, batch_size=2)[3:6]
    assert [batch.indices for batch in batches] == [(6, 7, 8, 9), (10, 11)]
    assert torch.cat([b.latents for b in batches]).equal(torch.cat([b.latents for b in expected]))
    assert torch.cat([b.pixels for b in batches]).equal(torch.cat([b.pixels for b in expected]))
    unthreaded = replace(images, num_threads=0)
    size = {"size": 24, "crop_fraction": 0.9}
    ours, alone = (each.pixel_batches("train", 1, **size) for each in (images, unthreaded))
    for batch, expected in zip(ours, alone, strict=True):
        assert (batch.indices, batch.keys) == (expected.indices, expected.keys)
        assert batch.pixels.equal(expected.pixels)


def test_only_the_centre_is_seen(tiny_data: Path):
    sample = next(iter(read_images(tiny_data / "images", "val")))  # its size is 40 x 36
    whole = module.centre_row(sample, size=36, crop_fraction=1.0)[3]
    centre = module.centre_row(sample, size=18, crop_fraction=0.5)[3]
    assert torch.equal(centre, whole[:, 9:27, 9:27])


def test_images_in_memory_are_encoded_as_stored_ones(tiny_base: Path, tiny_data: Path):
    (stored,) = batches_of(tiny_data, split="val")
    centres = [decode(i.image, name="")[:, 2:38] for i in read_images(tiny_data / "images", "val")]
    batch = module.encode_images(load_vae(tiny_base), torch.stack(centres), stored.labels, size=32)
    assert batch.indices == stored.indices
    assert batch.labels.equal(stored.labels)
    assert batch.pixels.equal(stored.pixels)
    torch.testing.assert_close(batch.latents, stored.latents, atol=2e-3, rtol=2e-3)
