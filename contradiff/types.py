"""Names of tensor shapes that many modules share."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Pixels = Float[Tensor, "batch 3 height width"]
"""Images as networks read them: RGB in [-1, 1]."""

Conditions = Float[Tensor, "batch channels_x size size"]
"""Input of the conditioner: Pixels, clean Latents, or Gaussian noise of the same shape."""

ByteImages = UInt8[Tensor, "batch 3 height width"]
"""Images as they are stored, generated and scored: RGB, 0 to 255."""

Latents = Float[Tensor, "batch channels h w"]
"""Clean or noisy latents, already multiplied by the VAE's scaling factor."""

Timesteps = Int[Tensor, " batch"]
"""Timesteps of training: 0 (least noise) to num_train_timesteps - 1 (most noise)."""

Tokens = Float[Tensor, "batch num_tokens width_c"]
"""The vectors that the UNet's cross-attention attends to (diffusers: encoder_hidden_states)."""

Maps = Float[Tensor, "batch width_m h_m w_m"]
"""Output of UNet blocks (parameter head.block) for noisy latents of one noise level."""

Features = Float[Tensor, "batch width"]
"""The feature h of Eq. 4."""


def to_pixels(images: ByteImages) -> Pixels:
    """Convert uint8 (0 to 255) to float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)  # in place, because `float` has copied the images


def to_bytes(pixels: Float[Tensor, "batch 3 height width"]) -> ByteImages:
    """Convert floats in [-1, 1] to uint8 (0 to 255); round them, and clip values outside."""
    return pixels.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
