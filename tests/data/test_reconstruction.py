"""Against diffusers' own calls; bad latents are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contradiff.base.loading import load_vae
from contradiff.data.encoding import LatentEncoder, Reconstruction, reconstruct
from contradiff.data.latents import LatentsParams
from contradiff.data.shards import read_images, read_split


@pytest.fixture
def encoder(tiny_base: Path) -> LatentEncoder:
    params = LatentsParams(
        views=3,
        flips=False,
        crop_scale_min=0.4,
        colour_jitter=0.5,
        dtype="float16",
        min_psnr=1.0,
        batch_size=12,
    )
    return LatentEncoder(load_vae(tiny_base), params, 32, 0)


def of_val(encoder: LatentEncoder, data: Path) -> Reconstruction:
    images = read_images(data / "images", "val")
    return reconstruct(encoder, images, read_split(data / "latents", "val"))


def test_reconstruction_is_diffusers_own(encoder: LatentEncoder, tiny_data: Path):
    found = of_val(encoder, tiny_data)
    pixels = found.originals.float() / 127.5 - 1
    with torch.no_grad():
        mean = encoder.vae.encode(pixels).latent_dist.mean
        decoded = encoder.vae.decode(mean).sample.clamp(-1, 1)
    error = (found.decoded / 127.5 - 1 - decoded).abs()
    assert error.max() <= 1 / 127.5 + 1e-3  # rounding to bytes, and float16
    assert found.std == pytest.approx(0.5 * mean.std().item(), rel=1e-3)
    squares = (found.originals.double() - found.decoded).square().mean(dim=(1, 2, 3))
    expected = (10 * torch.log10(255**2 / squares)).mean().item()
    assert found.psnr == pytest.approx(expected, rel=1e-5)


def test_latents_that_show_too_little_are_refused(encoder: LatentEncoder, tiny_data: Path):
    quality = of_val(encoder, tiny_data).psnr
    for floor in (quality - 0.01, quality + 0.01):
        params = encoder.params.model_copy(update={"min_psnr": floor})
        stricter = replace(encoder, params=params)
        if floor < quality:
            of_val(stricter, tiny_data)
        else:
            with pytest.raises(ValueError, match=r"^latents\.min_psnr: .* dB where .* factor"):
                of_val(stricter, tiny_data)


def test_another_scaling_factor_than_the_bases_shows(
    encoder: LatentEncoder, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
):
    right = of_val(encoder, tiny_data)
    other = encoder.info.model_copy(update={"scaling_factor": 1.0})
    monkeypatch.setattr(LatentEncoder, "info", other)
    wrong = of_val(encoder, tiny_data)
    assert wrong.std == pytest.approx(2 * right.std)
    assert not wrong.decoded.equal(right.decoded)
