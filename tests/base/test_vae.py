"""The functions agree with diffusers' methods."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from contradiff.base.loading import load_vae
from contradiff.base.vae import LOG_VARIANCE_RANGE, decode_latents, encode, mode, sample
from contradiff.types import to_bytes


@pytest.fixture(scope="module")
def vae(tiny_base: Path) -> AutoencoderKL:
    return load_vae(tiny_base)


def random_pixels(number: int = 2) -> Tensor:
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_moments() -> Tensor:
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2)).half()


def test_moments_are_those_of_diffusers_and_within_its_range(vae: AutoencoderKL):
    posterior = vae.encode(random_pixels()).latent_dist
    moments = encode(vae, random_pixels())
    assert moments[:, :4].equal(posterior.mean)
    assert moments[:, 4:].equal(posterior.logvar)
    # Log-variances are clipped, so that their exponentials are finite in half precision.
    moments = encode(vae, random_pixels() * 1e4)
    assert moments[:, 4:].min() >= LOG_VARIANCE_RANGE[0]
    assert moments[:, 4:].max() <= LOG_VARIANCE_RANGE[1]


def test_sample_is_that_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = random_moments()
    posterior = DiagonalGaussianDistribution(moments.float())
    expected = posterior.sample(torch.Generator().manual_seed(3)) * 0.18215
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample(moments, noise=noise, scaling_factor=0.18215), expected)
    mean = mode(moments, scaling_factor=0.18215)
    assert mean.dtype == torch.float32
    assert mean.equal(sample(moments, noise=torch.zeros_like(noise), scaling_factor=0.18215))


def test_decoding_undoes_the_scaling(vae: AutoencoderKL):
    mean = vae.encode(random_pixels()).latent_dist.mean
    expected = to_bytes(vae.decode(mean).sample)
    latents = mode(encode(vae, random_pixels()), scaling_factor=vae.config["scaling_factor"])
    # Equality holds because x * 0.5 / 0.5 is exact.
    assert decode_latents(vae, latents).equal(expected)
