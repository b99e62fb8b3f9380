"""Against diffusers' own calls, and by its properties."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contradiff.base.loading import load_vae
from contradiff.base.vae import LOG_VARIANCE_RANGE, decode_latents, encode, mode, sample
from contradiff.data.encoding import chunks_of, encode_chunks
from contradiff.data.latents import LatentsParams, StoredLatents, choose_crops, latent_info
from contradiff.data.shard_info import LatentInfo
from contradiff.data.shards import Sample, ShardIndex, array_from_bytes, read_images, read_split
from contradiff.data.transforms import Crop, apply_crop, centre_crop, decode
from contradiff.types import to_bytes, to_pixels

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CPU = torch.device("cpu")
IMAGE = torch.zeros(3, 40, 36, dtype=torch.uint8)


@pytest.fixture(scope="module")
def vae(tiny_base: Path) -> "AutoencoderKL":
    return load_vae(tiny_base)


@pytest.fixture(scope="module")
def stored(tiny_data: Path) -> list[StoredLatents]:
    records = read_split(tiny_data / "latents", "train")
    return [StoredLatents.of_record(record) for record in records]


def params_of(**changes: Any) -> LatentsParams:
    settings = {
        "views": 3,
        "flips": False,
        "crop_scale_min": 0.4,
        "colour_jitter": 0.0,
        "dtype": "float16",
        "min_psnr": 0.0,
        "batch_size": 24,
    }
    return LatentsParams.model_validate(settings | changes)


def encoded(
    vae: "AutoencoderKL", samples: Iterable[Sample], params: LatentsParams
) -> list[StoredLatents]:
    """Training images, encoded as the stage does it."""
    return list(
        encode_chunks(
            vae,
            chunks_of(samples, split="train", params=params),
            params=params,
            image_size=32,
            seed=0,
            device=CPU,
            num_workers=0,
        )
    )


def random_pixels(number: int = 2) -> Tensor:
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_moments() -> Tensor:
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2)).half()


def test_moments_are_those_of_diffusers(vae: "AutoencoderKL"):
    posterior = vae.encode(random_pixels()).latent_dist
    moments = encode(vae, random_pixels())
    assert moments[:, :4].equal(posterior.mean)
    assert moments[:, 4:].equal(posterior.logvar)


def test_stored_moments_are_finite_in_half_precision(vae: "AutoencoderKL"):
    """Exponentials of what is beyond the range would not be."""
    moments = encode(vae, random_pixels() * 1e4)
    assert moments[:, 4:].min() >= LOG_VARIANCE_RANGE[0]
    assert moments[:, 4:].max() <= LOG_VARIANCE_RANGE[1]


def test_sample_is_that_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = random_moments()
    posterior = DiagonalGaussianDistribution(moments.float())
    expected = posterior.sample(torch.Generator().manual_seed(3)) * 0.18215
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    shown = sample(moments, noise=noise, scaling_factor=0.18215)
    torch.testing.assert_close(shown, expected)


def test_mode_is_the_sample_without_noise():
    moments = random_moments()
    shown = mode(moments, scaling_factor=0.5)
    assert shown.dtype == torch.float32
    assert shown.equal(sample(moments, noise=torch.zeros(2, 4, 8, 8), scaling_factor=0.5))
    assert shown.equal(0.5 * moments[:, :4].float())


def test_decoding_undoes_the_scaling(vae: "AutoencoderKL"):
    mean = vae.encode(random_pixels()).latent_dist.mean
    expected = to_bytes(vae.decode(mean).sample)
    latents = mode(encode(vae, random_pixels()), scaling_factor=vae.config["scaling_factor"])
    # x * 0.5 / 0.5 is exact
    assert decode_latents(vae, latents).equal(expected)


def test_crops_depend_on_seed_and_key_alone():
    def crops(key: str, seed: int, views: int = 5) -> list[Crop]:
        return choose_crops(IMAGE, key=key, views=views, crop_scale_min=0.4, seed=seed)

    assert crops("a", 0) == crops("a", 0)
    assert crops("a", 0)[1:] != crops("b", 0)[1:]
    assert crops("a", 0)[1:] != crops("a", 1)[1:]
    assert len(set(crops("a", 0))) == 5
    assert crops("a", 0, views=3) == crops("a", 0)[:3]


def test_first_view_is_the_centre_crop():
    for views in (1, 3):
        crops = choose_crops(IMAGE, key="a", views=views, crop_scale_min=0.4, seed=0)
        assert len(crops) == views
        assert crops[0] == centre_crop(40, 36) == Crop(2, 0, 36, 36, mirrored=False)


def test_record_round_trip():
    item = StoredLatents(
        "n01_5",
        torch.stack([random_moments()[0]] * 2).numpy(),
        (Crop(2, 0, 36, 36, mirrored=False), Crop(1, 2, 3, 4, mirrored=True)),
    )
    read = StoredLatents.of_record(item.to_record())
    assert (read.key, read.crops) == (item.key, item.crops)
    assert read.moments.dtype == np.float16
    np.testing.assert_array_equal(read.moments, item.moments)


def test_every_view_is_the_encoding_of_its_crop(
    vae: "AutoencoderKL", tiny_data: Path, stored: list[StoredLatents]
):
    """A mirrored view is encoded from mirrored pixels: the VAE does not commute with mirroring."""
    images = list(read_images(tiny_data / "images", "train"))
    assert [item.key for item in stored] == [image.key for image in images]
    num_mirrored = 0
    for image, item in list(zip(images, stored, strict=True))[:6]:
        decoded = decode(image.image, name=image.key)
        for moments, crop in zip(item.moments, item.crops, strict=True):
            pixels = to_pixels(apply_crop(decoded, crop, size=32)[None])
            expected = encode(vae, pixels)[0]
            shown = torch.from_numpy(moments).float()
            torch.testing.assert_close(shown, expected, atol=2e-3, rtol=2e-3)
            if crop.mirrored:
                num_mirrored += 1
                unmirrored = encode(vae, pixels.flip(-1))[0].flip(-1)
                assert (unmirrored - expected).abs().max() > 0.02
    assert num_mirrored > 0


@pytest.mark.parametrize("batch_size", [1, 7, 72])
def test_batch_size_changes_nothing(
    vae: "AutoencoderKL", tiny_data: Path, stored: list[StoredLatents], batch_size: int
):
    samples = read_images(tiny_data / "images", "train")
    again = encoded(vae, samples, params_of(batch_size=batch_size))
    assert [(item.key, item.crops) for item in again] == [(s.key, s.crops) for s in stored]
    for item, expected in zip(again, stored, strict=True):
        assert item.moments.dtype == np.float16
        np.testing.assert_allclose(item.moments, expected.moments, atol=2e-3, rtol=2e-3)


def test_colours_of_random_crops_alone_are_distorted(
    vae: "AutoencoderKL", tiny_data: Path, stored: list[StoredLatents]
):
    distorted, once_more = (encoded_first_six(vae, tiny_data, colour_jitter=0.5) for _ in range(2))
    for item, again, plain in zip(distorted, once_more, stored[:6], strict=True):
        assert item.crops == plain.crops
        np.testing.assert_array_equal(item.moments, again.moments)
        np.testing.assert_allclose(item.moments[0], plain.moments[0], atol=2e-3, rtol=2e-3)
        for view in (1, 2):
            assert np.abs(item.moments[view] - plain.moments[view]).max() > 0.02


def encoded_first_six(vae: "AutoencoderKL", tiny_data: Path, **changes: Any) -> list[StoredLatents]:
    samples = islice(read_images(tiny_data / "images", "train"), 6)
    return encoded(vae, samples, params_of(**changes))


def test_flips_are_encodings_of_mirrored_pixels_behind_the_views(
    vae: "AutoencoderKL", tiny_data: Path
):
    images = list(islice(read_images(tiny_data / "images", "train"), 6))
    plain = encoded_first_six(vae, tiny_data, colour_jitter=0.5)
    flipped = encoded_first_six(vae, tiny_data, colour_jitter=0.5, flips=True)
    for image, item, without in zip(images, flipped, plain, strict=True):
        assert item.crops[:3] == without.crops
        assert item.crops[3:] == tuple(
            replace(crop, mirrored=not crop.mirrored) for crop in without.crops
        )
        np.testing.assert_allclose(item.moments[:3], without.moments, atol=2e-3, rtol=2e-3)
        # the centre crop, which no colours are changed of
        pixels = apply_crop(decode(image.image, name=image.key), item.crops[0], size=32)
        expected = encode(vae, to_pixels(pixels.flip(-1)[None]))[0]
        shown = torch.from_numpy(item.moments[3]).float()
        torch.testing.assert_close(shown, expected, atol=2e-3, rtol=2e-3)
        assert np.abs(item.moments[3] - item.moments[0][..., ::-1]).max() > 0.02


def test_bfloat16_moments_are_rounded_as_torch_rounds(vae: "AutoencoderKL", tiny_data: Path):
    (image,) = islice(read_images(tiny_data / "images", "train"), 1)
    pixels = apply_crop(decode(image.image, name=image.key), centre_crop(40, 36), size=32)
    expected = encode(vae, to_pixels(pixels[None])).bfloat16()
    params = params_of(views=1, dtype="bfloat16", batch_size=1)
    (item,) = encoded(vae, [image], params)
    assert torch.from_numpy(item.moments).equal(expected.float())
    record = item.to_record()
    bits = array_from_bytes(record["moments.npy"])
    assert bits.dtype == np.uint16
    assert torch.from_numpy(bits).view(torch.bfloat16).equal(expected)
    np.testing.assert_array_equal(StoredLatents.of_record(record).moments, item.moments)
    assert latent_info(vae, params=params, image_size=32).dtype == "bfloat16"


def test_evaluated_images_have_one_view(tiny_data: Path):
    for record in read_split(tiny_data / "latents", "val"):
        item = StoredLatents.of_record(record)
        assert item.moments.shape == (1, 8, 8, 8)
        assert item.crops == (centre_crop(40, 36),)


def test_infos_are_those_of_the_base(vae: "AutoencoderKL", tiny_data: Path):
    info = ShardIndex.read(tiny_data / "latents", LatentInfo).info
    assert info == latent_info(vae, params=params_of(), image_size=32)
    assert info.scaling_factor == 0.5
