"""Pixels <-> latents: the only place that knows the VAE's scaling factor.

images, 3 x s x s in [-1, 1] => moments (mean, log-variance), 2c x s/f x s/f
moments => latents ~ N(mean, variance) * scaling_factor, unit scale, what the UNet sees
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from contradiff.types import ByteImages, Latents, Pixels, to_bytes

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Moments = Float[Tensor, "batch moments h w"]
"""Mean and log-variance of the VAE's posterior, stacked along the channels; before scaling."""

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Diffusers' bounds, which also keep moments finite in float16."""


def scaling_factor(vae: "AutoencoderKL") -> float:
    """Return the factor that gives latents a standard deviation of about 1."""
    return float(vae.config["scaling_factor"])


def downsampling_factor(vae: "AutoencoderKL") -> int:
    """Return the side of an image divided by that of its latent: 8 for Stable Diffusion.

    *Deviation*: the paper says f = 4, which its base does not have.
    """
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


@torch.no_grad()
def encode(vae: "AutoencoderKL", pixels: Pixels) -> Moments:
    """Return the posterior's moments, with the log-variance cut to diffusers' range."""
    posterior = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    return torch.cat([posterior.mean, posterior.logvar.clamp(*LOG_VARIANCE_RANGE)], dim=1)


def sample(
    moments: Moments, *, noise: Float[Tensor, "batch channels h w"], scaling_factor: float
) -> Latents:
    """Draw scaled latents from stored moments: (mean + std * noise) * scaling_factor."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * noise) * scaling_factor


def mode(moments: Moments, *, scaling_factor: float) -> Latents:
    """Return the posterior's scaled mean, which evaluation uses because it is not random."""
    return moments.float().chunk(2, dim=1)[0] * scaling_factor


@torch.no_grad()
def decode_latents(vae: "AutoencoderKL", latents: Latents) -> ByteImages:
    """Decode scaled latents."""
    decoded = vae.decode(latents / vae.config["scaling_factor"])
    return to_bytes(decoded.sample)  # pyright: ignore[reportAttributeAccessIssue]


def psnr(images: ByteImages, decoded: ByteImages) -> Float[Tensor, " batch"]:
    """Return each image's peak signal-to-noise ratio in dB.

    Identical images count as if one value was wrong by one level, since theirs would be infinite.
    """
    error = (images.float() - decoded.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1 / images[0].numel()))
