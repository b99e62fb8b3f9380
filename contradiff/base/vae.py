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
"""Diffusers' bounds; also what keeps stored float16 moments finite."""


def scaling_factor(vae: "AutoencoderKL") -> float:
    """What latents are multiplied by, so that their standard deviation is about 1."""
    return float(vae.config["scaling_factor"])


def downsampling_factor(vae: "AutoencoderKL") -> int:
    """Pixels to a latent's side: 8 for Stable Diffusion (the paper's "f = 4" is not its own)."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


@torch.no_grad()
def encode(vae: "AutoencoderKL", pixels: Pixels) -> Moments:
    """Moments of the posterior, log-variance held to diffusers' range."""
    posterior = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    return torch.cat([posterior.mean, posterior.logvar.clamp(*LOG_VARIANCE_RANGE)], dim=1)


def sample(
    moments: Moments, *, noise: Float[Tensor, "batch channels h w"], scaling_factor: float
) -> Latents:
    """Draw scaled latents from stored moments: (mean + std * noise) * scaling_factor."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * noise) * scaling_factor


def mode(moments: Moments, *, scaling_factor: float) -> Latents:
    """The posterior's mean, scaled: what evaluation uses, so that nothing is random."""
    return moments.float().chunk(2, dim=1)[0] * scaling_factor


@torch.no_grad()
def decode_latents(vae: "AutoencoderKL", latents: Latents) -> ByteImages:
    """Scaled latents => uint8 images."""
    decoded = vae.decode(latents / vae.config["scaling_factor"])
    return to_bytes(decoded.sample)  # pyright: ignore[reportAttributeAccessIssue]


def psnr(images: ByteImages, decoded: ByteImages) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each image, in dB; identical images count as one level off."""
    error = (images.float() - decoded.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1 / images[0].numel()))
