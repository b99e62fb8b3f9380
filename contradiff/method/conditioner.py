"""The image conditioner: an image -> tokens for the UNet's cross-attention (Sec. 4.1, Fig. 2)."""

import torch
from torch import nn

from contradiff.method.params import ConditionerParams
from contradiff.method.transformer import Block
from contradiff.types import Conditions, Latents, Pixels, Tokens


class Conditioner(nn.Module):
    """A ViT that encodes the clean image: patches, learned positions, pre-norm blocks, one Linear.

    The last layer starts at zero, so all tokens are zero when training starts. The tiny base was
    trained with zero tokens as "no condition". In Stable Diffusion, zero tokens make the output of
    cross-attention a constant. The paper does not say how its conditioner is initialised.
    """

    def __init__(
        self, params: ConditionerParams, *, in_channels: int, size: int, cross_attention_dim: int
    ) -> None:
        super().__init__()
        width, patch_size, heads = params.width, params.patch_size, params.num_heads
        assert size % patch_size == 0, "rules.py refuses other sizes"
        self.input = params.input
        self.shape = (in_channels, size, size)
        num_tokens = (size // patch_size) ** 2
        self.to_patches = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        blocks = (Block(width, num_heads=heads, mlp_ratio=4) for _ in range(params.depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.to_tokens = nn.Linear(width, cross_attention_dim)
        nn.init.zeros_(self.to_tokens.weight)
        nn.init.zeros_(self.to_tokens.bias)

    def choose(self, *, pixels: Pixels, latents: Latents) -> Conditions:
        """Return `pixels` if the parameter conditioner.input is "pixels", otherwise `latents`."""
        return pixels if self.input == "pixels" else latents

    def forward(self, conditions: Conditions) -> Tokens:
        """Turn pixels, scaled latents or Gaussian noise into tokens."""
        patches = self.to_patches(conditions).flatten(2).transpose(1, 2)
        return self.to_tokens(self.norm(self.blocks(patches + self.positions)))
