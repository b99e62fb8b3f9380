"""Shapes and choices that travel through the system, named once."""

from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Precision = Literal["fp32", "bf16"]
"""Precision of a network's passes, by autocast; trained weights and sums stay float32."""

Pixels = Float[Tensor, "batch 3 height width"]
"""Images for the networks: RGB in [-1, 1]."""

Conditions = Float[Tensor, "batch channels_x size size"]
"""Input of the conditioner: Pixels or clean Latents, or Gaussian noise of the same shape."""

ByteImages = UInt8[Tensor, "batch 3 height width"]
"""Images as stored, generated and scored: RGB, 0 to 255."""

Latents = Float[Tensor, "batch channels h w"]
"""Clean or noisy latents, already multiplied by the VAE's scaling factor (unit scale)."""

Timesteps = Int[Tensor, " batch"]
"""Indices of the noise scheduler's training grid: 0 (clean) to num_train_timesteps - 1 (noise)."""

Tokens = Float[Tensor, "batch num_tokens width_c"]
"""encoder_hidden_states: what the UNet's cross-attention attends to."""

Maps = Float[Tensor, "batch width_m h_m w_m"]
"""Maps that the UNet's blocks in head.block give at one noise level."""

Features = Float[Tensor, "batch width"]
"""The feature h of Eq. 4."""


def to_pixels(images: ByteImages) -> Pixels:
    """Take uint8, 0 to 255, to float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)  # in place: `float` has made a copy


def to_bytes(pixels: Float[Tensor, "batch 3 height width"]) -> ByteImages:
    """Take floats in [-1, 1] to uint8, 0 to 255: rounded, and values outside cut off."""
    return pixels.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
