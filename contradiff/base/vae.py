"""Conversion between pixels and latents, with the VAE's scaling factor applied.

images (3 x s x s, in [-1, 1]) => moments: mean and log-variance (2c x s/f x s/f)
moments => latents for the UNet: samples of N(mean, variance) * scaling_factor, about unit scale
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from contradiff.types import ByteImages, Latents, Pixels, to_bytes

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Moments = Float[Tensor, "batch moments h w"]
"""Mean and log-variance of unscaled latents, stacked along the channels."""

LOG_VARIANCE_RANGE = (-14.0, 20.0)
"""Limits of log-variances. They keep moments finite in float16.

*Deviation*: the lower limit of diffusers is -30. At -14 the noise (std 0.0009) is already smaller
than the rounding error of a stored mean, and a constant takes no room in a compressed shard.
"""


def scaling_factor(vae: "AutoencoderKL") -> float:
    """Return the factor that gives latents a standard deviation of about 1."""
    return float(vae.config["scaling_factor"])


def downsampling_factor(vae: "AutoencoderKL") -> int:
    """Return the side of an image divided by the side of its latent: 8 for Stable Diffusion.

    *Deviation*: the paper says f = 4, but its base, Stable Diffusion v1, has f = 8.
    """
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


@torch.no_grad()
def encode(vae: "AutoencoderKL", pixels: Pixels) -> Moments:
    """Encode images as moments: means, and log-variances clipped to LOG_VARIANCE_RANGE."""
    posterior = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    return torch.cat([posterior.mean, posterior.logvar.clamp(*LOG_VARIANCE_RANGE)], dim=1)


def sample(
    moments: Moments, *, noise: Float[Tensor, "batch channels h w"], scaling_factor: float
) -> Latents:
    """Draw scaled latents from moments: (mean + std * noise) * scaling_factor."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * noise) * scaling_factor


def mode(moments: Moments, *, scaling_factor: float) -> Latents:
    """Return the scaled mean of the posterior. Evaluation uses the mean, as it is not random."""
    return moments.float().chunk(2, dim=1)[0] * scaling_factor


@torch.no_grad()
def decode_latents(vae: "AutoencoderKL", latents: Latents, *, first: int = 0) -> ByteImages:
    """Decode scaled latents to images of uint8.

    `first` is the number of the first image, for messages. Raises ValueError if an image has NaN or
    infinite values, which uint8 would show as black.
    """
    decoded: Tensor = vae.decode(latents / vae.config["scaling_factor"]).sample  # pyright: ignore[reportAttributeAccessIssue]
    is_finite = decoded.isfinite().flatten(1).all(1)
    if not bool(is_finite.all()):
        number = first + is_finite.tolist().index(False)
        raise ValueError(
            f"base.path: the VAE decodes image {number} to NaN or infinite values; the weights in "
            "build/base/vae are broken, or the latents are far too large"
        )
    return to_bytes(decoded)


def psnr(images: ByteImages, decoded: ByteImages) -> Float[Tensor, " batch"]:
    """Return each image's peak signal-to-noise ratio in dB.

    Identical images would have an infinite PSNR. They count as if one value differed by 1.
    """
    error = (images.float() - decoded.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1 / images[0].numel()))
