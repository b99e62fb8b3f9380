"""Workers change nothing, sizes are foretold, bad latents are refused."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from contradiff.base.loading import load_vae
from contradiff.data.encoding import (
    Reconstruction,
    chunks_of,
    describe_cost,
    encode_chunks,
    latents_bytes,
    shard_bytes,
    views_of,
)
from contradiff.data.latents import LatentsParams, StoredLatents
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Sample, ShardIndex, read_images, read_split

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tiny_base: Path) -> "AutoencoderKL":
    return load_vae(tiny_base)


def params_of(**changes: Any) -> LatentsParams:
    settings = {
        "views": 3,
        "flips": False,
        "crop_scale_min": 0.4,
        "colour_jitter": 0.5,
        "dtype": "float16",
        "min_psnr": 0.0,
        "batch_size": 12,
    }
    return LatentsParams.model_validate(settings | changes)


def encoded(
    vae: "AutoencoderKL", samples: list[Sample], params: LatentsParams, *, num_workers: int
) -> list[StoredLatents]:
    chunks = chunks_of(iter(samples), split="train", params=params)
    return list(
        encode_chunks(
            vae, chunks, params=params, image_size=32, seed=0, device=CPU, num_workers=num_workers
        )
    )


def test_workers_change_nothing(vae: "AutoencoderKL", tiny_data: Path):
    samples = list(read_images(tiny_data / "images", "train"))[:10]
    alone = encoded(vae, samples, params_of(flips=True), num_workers=0)
    helped = encoded(vae, samples, params_of(flips=True), num_workers=2)
    assert [item.key for item in alone] == [sample.key for sample in samples]
    for item, other in zip(alone, helped, strict=True):
        assert item.to_record() == other.to_record()


def test_chunks_hold_a_batch_of_crops(tiny_data: Path):
    def sizes(split: str, **changes: Any) -> list[int]:
        samples, params = read_images(tiny_data / "images", "train"), params_of(**changes)
        return [len(chunk.samples) for chunk in chunks_of(samples, split=split, params=params)]

    assert sizes("train") == [4] * 6
    assert sizes("train", flips=True) == [2] * 12
    assert sizes("train", batch_size=1) == [1] * 24
    assert sizes("train", batch_size=30) == [10, 10, 4]
    assert sizes("val", flips=True) == [12, 12]
    assert views_of("val", params_of(flips=True)) == (1, False)
    assert views_of("train", params_of(flips=True)) == (3, True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_named_in_one_line(vae: "AutoencoderKL", num_workers: int):
    with pytest.raises(ValueError, match=r"^n01_7: not a readable image") as caught:
        encoded(vae, [Sample("n01_7", b"nothing", 0)], params_of(), num_workers=num_workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("split", "views"), [("train", 3), ("val", 1)])
def test_sizes_are_those_of_written_shards(tiny_data: Path, split: str, views: int):
    for shard in ShardIndex.read(tiny_data / "latents", LatentInfo).shards(split):
        foretold = shard_bytes(shard.num_samples, stored_views=views, moments_shape=(8, 8, 8))
        assert foretold == shard.num_bytes


def test_imagenet_takes_21_gb_a_view():
    """The performance page's figure, 16 KB of moments an image, and a tenth of tar and crops."""
    of_shards = 313 * shard_bytes(4096, stored_views=1, moments_shape=(8, 32, 32))
    assert 21e9 < of_shards < 24e9


def test_cost_is_that_of_all_splits(vae: "AutoencoderKL", tiny_data: Path):
    index = ShardIndex.read(tiny_data / "images", ImageInfo)
    cost = latents_bytes(index, vae, params=params_of(), image_size=32)
    latents = ShardIndex.read(tiny_data / "latents", LatentInfo)
    assert cost == {
        split: sum(shard.num_bytes for shard in latents.shards(split)) for split in latents.splits
    }
    more = latents_bytes(index, vae, params=params_of(flips=True), image_size=32)
    assert more["val"] == cost["val"]
    assert more["train"] > cost["train"]
    assert describe_cost(more, index, params_of(flips=True)).endswith(
        "(24 x 3 views and their mirror images), val 30.7 kB (8 x 1 view)"
    )


def test_reconstruction_is_diffusers_own(vae: "AutoencoderKL", tiny_data: Path):
    images = list(read_images(tiny_data / "images", "val"))
    records = list(read_split(tiny_data / "latents", "val"))
    info = ShardIndex.read(tiny_data / "latents", LatentInfo).info
    found = Reconstruction.of(vae, images, records, info=info, device=CPU)
    pixels = found.originals.float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(mean).sample.clamp(-1, 1)
    error = (found.decoded / 127.5 - 1 - decoded).abs()
    assert error.max() <= 1 / 127.5 + 1e-3  # rounding to bytes, and float16
    assert found.std == pytest.approx(0.5 * mean.std().item(), rel=1e-3)
    squared = (found.decoded.double() - found.originals.double()).square().mean(dim=(1, 2, 3))
    expected = np.mean([10 * np.log10(255**2 / value) for value in squared.tolist()])
    assert found.psnr == pytest.approx(expected, rel=1e-5)

    found.check(floor=found.psnr - 0.01)
    with pytest.raises(ValueError, match=r"^latents\.min_psnr: .* dB where .* scaling factor"):
        found.check(floor=found.psnr + 0.01)


def test_another_scaling_factor_than_the_bases_shows(vae: "AutoencoderKL", tiny_data: Path):
    images = list(read_images(tiny_data / "images", "val"))
    records = list(read_split(tiny_data / "latents", "val"))
    info = ShardIndex.read(tiny_data / "latents", LatentInfo).info
    right = Reconstruction.of(vae, images, records, info=info, device=CPU)
    info = info.model_copy(update={"scaling_factor": 2 * info.scaling_factor})
    wrong = Reconstruction.of(vae, images, records, info=info, device=CPU)
    assert wrong.std == pytest.approx(2 * right.std)
    assert not wrong.decoded.equal(right.decoded)
