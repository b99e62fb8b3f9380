"""Every crop is encoded as it would be alone; latents that show too little are refused."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contradiff.base.loading import load_vae
from contradiff.base.vae import encode
from contradiff.data.encoding import LatentEncoder, Reconstruction, reconstruct
from contradiff.data.latents import StoredLatents
from contradiff.data.params import LatentsParams
from contradiff.data.png import encode_png
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Sample, ShardIndex, read_images, read_split
from contradiff.data.transforms import Crop, apply_crop, centre_crop, decode
from contradiff.types import to_pixels
from tests.settings import LATENTS

CENTRE = Crop(2, 0, 36, 36, mirrored=False)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> LatentEncoder:
    """An encoder as `tiny_data` was made by."""
    return LatentEncoder(load_vae(tiny_base), LatentsParams.model_validate(LATENTS), 32, 0)


def changed(encoder: LatentEncoder, **changes: Any) -> LatentEncoder:
    return replace(encoder, params=LatentsParams.model_validate(LATENTS | changes))


@pytest.fixture(scope="module")
def images(tiny_data: Path) -> list[Sample]:
    """The first six training images."""
    return list(islice(read_images(tiny_data / "images", "train"), 6))


@pytest.fixture(scope="module")
def stored(tiny_data: Path) -> list[StoredLatents]:
    """Their latents."""
    records = islice(read_split(tiny_data / "latents", "train"), 6)
    return [StoredLatents.of_record(record) for record in records]


def encoded(encoder: LatentEncoder, samples: Iterable[Sample]) -> list[StoredLatents]:
    return list(encoder.encode(samples, split="train"))


def assert_near(found: Any, expected: Any) -> None:
    """Up to float16's rounding."""
    torch.testing.assert_close(
        torch.as_tensor(found).float(), torch.as_tensor(expected).float(), atol=2e-3, rtol=2e-3
    )


def encoding_of(encoder: LatentEncoder, image: Sample, crop: Crop) -> Tensor:
    """One crop, encoded alone."""
    pixels = apply_crop(decode(image.image, name=image.key), crop, size=32)
    return encode(encoder.vae, to_pixels(pixels[None]))[0]


def test_crops_depend_on_seed_and_key_alone(base: LatentEncoder):
    image = encode_png(torch.zeros(3, 40, 36, dtype=torch.uint8))

    def crops(key: str, seed: int, views: int = 5) -> tuple[Crop, ...]:
        encoder = replace(changed(base, views=views), seed=seed)
        return encoded(encoder, [Sample(key, image, 0)])[0].crops

    assert crops("a", 0) == crops("a", 0)
    assert crops("a", 0)[1:] != crops("b", 0)[1:]
    assert crops("a", 0)[1:] != crops("a", 1)[1:]
    assert len(set(crops("a", 0))) == 5
    assert crops("a", 0, views=3) == crops("a", 0)[:3]
    assert crops("a", 0, views=1) == (centre_crop(40, 36),) == (CENTRE,)


def test_every_view_is_the_encoding_of_its_crop(
    base: LatentEncoder, images: list[Sample], stored: list[StoredLatents]
):
    """A mirrored view is encoded from mirrored pixels: the VAE does not commute with mirroring."""
    num_mirrored = 0
    for image, item in zip(images, stored, strict=True):
        assert item.key == image.key
        for moments, crop in zip(item.moments, item.crops, strict=True):
            expected = encoding_of(base, image, crop)
            assert_near(moments, expected)
            if crop.mirrored:
                num_mirrored += 1
                unmirrored = encoding_of(base, image, replace(crop, mirrored=False)).flip(-1)
                assert (unmirrored - expected).abs().max() > 0.02
    assert num_mirrored > 0


def test_evaluated_images_have_the_centre_crop_alone(base: LatentEncoder, tiny_data: Path):
    info = ShardIndex.read(tiny_data / "latents", LatentInfo).info
    assert info == base.info
    assert (info.scaling_factor, info.image_size, info.views) == (0.5, 32, 3)
    for record in read_split(tiny_data / "latents", "val"):
        item = StoredLatents.of_record(record)
        assert (item.moments.shape, item.crops) == ((1, 8, 8, 8), (CENTRE,))


@pytest.mark.parametrize("batch_size", [1, 7, 72])
def test_batch_size_changes_nothing(
    base: LatentEncoder, images: list[Sample], stored: list[StoredLatents], batch_size: int
):
    again = encoded(changed(base, batch_size=batch_size), images)
    assert [(item.key, item.crops) for item in again] == [(s.key, s.crops) for s in stored]
    for item, expected in zip(again, stored, strict=True):
        assert item.moments.dtype == np.float16
        assert_near(item.moments, expected.moments)


def test_colours_of_random_crops_alone_are_distorted(
    base: LatentEncoder, images: list[Sample], stored: list[StoredLatents]
):
    encoder = changed(base, colour_jitter=0.5)
    distorted, once_more = encoded(encoder, images), encoded(encoder, images)
    for item, again, plain in zip(distorted, once_more, stored, strict=True):
        assert item.crops == plain.crops
        np.testing.assert_array_equal(item.moments, again.moments)
        assert_near(item.moments[0], plain.moments[0])
        for view in (1, 2):
            assert np.abs(item.moments[view] - plain.moments[view]).max() > 0.02


def test_flips_are_encodings_of_mirrored_pixels_behind_the_views(
    base: LatentEncoder, images: list[Sample]
):
    plain = encoded(changed(base, colour_jitter=0.5), images)
    flipped = encoded(changed(base, colour_jitter=0.5, flips=True), images)
    for image, item, without in zip(images, flipped, plain, strict=True):
        mirrored = tuple(replace(crop, mirrored=not crop.mirrored) for crop in without.crops)
        assert item.crops == without.crops + mirrored
        assert_near(item.moments[:3], without.moments)
        # the centre crop, whose colours are left alone
        assert_near(item.moments[3], encoding_of(base, image, mirrored[0]))
        assert np.abs(item.moments[3] - item.moments[0][..., ::-1]).max() > 0.02


def test_bfloat16_moments_are_rounded_as_torch_rounds(base: LatentEncoder, images: list[Sample]):
    expected = encoding_of(base, images[0], CENTRE).bfloat16().float()
    encoder = changed(base, views=1, dtype="bfloat16", batch_size=1)
    (item,) = encoded(encoder, images[:1])
    assert torch.from_numpy(item.moments[0]).equal(expected)
    assert encoder.info.dtype == "bfloat16"


def test_workers_change_nothing(base: LatentEncoder, images: list[Sample]):
    encoder = changed(base, flips=True, colour_jitter=0.5, batch_size=12)
    alone = encoded(encoder, images)
    helped = list(encoder.encode(images, split="train", num_workers=2))
    assert [item.to_record() for item in alone] == [item.to_record() for item in helped]
    assert [item.key for item in alone] == [image.key for image in images]


def test_a_batch_of_crops_is_encoded_at_once(
    base: LatentEncoder, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three views and their mirror images of each training image."""
    found: list[int] = []
    monkeypatch.setattr(
        LatentEncoder, "encode_cut", lambda _, cut: found.append(len(cut.keys)) or iter(())
    )
    expected = {("train", 24): [4] * 6, ("train", 1): [1] * 24, ("train", 60): [10, 10, 4]}
    for (split, batch_size), sizes in (expected | {("val", 5): [5, 3]}).items():
        found.clear()
        samples = read_images(tiny_data / "images", split)
        encoder = changed(base, flips=True, batch_size=batch_size)
        assert not list(encoder.encode(samples, split=split))
        assert found == sizes


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_named_in_one_line(base: LatentEncoder, num_workers: int):
    samples = [Sample("n01_7", b"nothing", 0)]
    with pytest.raises(ValueError, match=r"^n01_7: not a readable image") as caught:
        list(base.encode(samples, split="train", num_workers=num_workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bias", "dtype", "message"),
    [
        (torch.nan, "bfloat16", r"^base.path: the VAE's weights .* image number-2 are NaN"),
        (1e5, "float16", r"^latents.dtype: .* set latents.dtype to bfloat16 .* image number-2 are"),
    ],
)
def test_latents_that_are_not_finite_are_refused(
    tiny_base: Path, images: list[Sample], bias: float, dtype: str, message: str
):
    vae = load_vae(tiny_base)
    encoder = changed(LatentEncoder(vae, LatentsParams.model_validate(LATENTS), 32, 0), dtype=dtype)
    one_view = replace(encoder, params=encoder.params.model_copy(update={"views": 1}))
    samples = [replace(image, key=f"number-{n}") for n, image in enumerate(images)]

    def spoil(_: Any, __: Any, moments: Tensor) -> None:
        moments[2] += bias

    vae.quant_conv.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=message):
        encoded(one_view, samples)


def test_sizes_are_those_of_written_shards(base: LatentEncoder, tiny_data: Path):
    for split, shards in ShardIndex.read(tiny_data / "latents", LatentInfo).splits.items():
        for shard in shards:
            assert base.shard_bytes(split, shard.num_samples) == shard.num_bytes
    more = changed(base, flips=True)
    assert more.shard_bytes("val", 6) == base.shard_bytes("val", 6)
    assert more.shard_bytes("train", 6) > base.shard_bytes("train", 6)
    images = ShardIndex.read(tiny_data / "images", ImageInfo)
    assert more.describe_size(images).endswith(
        "(24 images x 3 views and their mirror images), val 30.7 kB (8 images x 1 view)"
    )


def of_val(base: LatentEncoder, data: Path) -> Reconstruction:
    images = read_images(data / "images", "val")
    return reconstruct(base, images, read_split(data / "latents", "val"))


def test_reconstruction_is_diffusers_own(base: LatentEncoder, tiny_data: Path):
    found = of_val(base, tiny_data)
    pixels = found.originals.float() / 127.5 - 1
    with torch.no_grad():
        mean = base.vae.encode(pixels).latent_dist.mean
        decoded = base.vae.decode(mean).sample.clamp(-1, 1)
    error = (found.decoded / 127.5 - 1 - decoded).abs()
    assert error.max() <= 1 / 127.5 + 1e-3  # rounding to bytes, and float16
    assert found.std == pytest.approx(0.5 * mean.std().item(), rel=1e-3)
    squares = (found.originals.double() - found.decoded).square().mean(dim=(1, 2, 3))
    assert found.psnr == pytest.approx((10 * torch.log10(255**2 / squares)).mean().item(), rel=1e-5)


def test_latents_that_show_too_little_are_refused(base: LatentEncoder, tiny_data: Path):
    quality = of_val(base, tiny_data).psnr
    assert of_val(changed(base, min_psnr=quality - 0.01), tiny_data).psnr == quality
    with pytest.raises(ValueError, match=r"^latents\.min_psnr: .* dB, below .* factor"):
        of_val(changed(base, min_psnr=quality + 0.01), tiny_data)


def test_another_scaling_factor_than_the_bases_shows(
    base: LatentEncoder, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
):
    right = of_val(base, tiny_data)
    monkeypatch.setattr(LatentEncoder, "info", base.info.model_copy(update={"scaling_factor": 1.0}))
    wrong = of_val(base, tiny_data)
    assert wrong.std == pytest.approx(2 * right.std)
    assert not wrong.decoded.equal(right.decoded)
