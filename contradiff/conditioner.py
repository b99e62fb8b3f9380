"""The image conditioner: pixels -> tokens for the UNet's cross-attention (Sec. 4.1, Fig. 2)."""

from typing import Literal

import torch
from jaxtyping import Bool
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.blocks import Block
from contradiff.config import Section
from contradiff.types import Pixels, Tokens


class ConditionerParams(Section):
    """Section `conditioner`. Paper: width 512; depth, heads and patches follow from its count."""

    patch_size: int = Field(ge=1, description="pixels")
    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    drop: float = Field(
        ge=0, lt=1, description="chance that a condition is Gaussian pixels (App. A)"
    )
    cond_view: Literal["same", "crop", "noise"] = Field(
        description="same: one clean image for both views (paper) | crop: an independent crop for "
        "each | noise: as same, but the second view has the null condition"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ConditionerParams":
        if self.width % self.num_heads:
            msg = "conditioner.width must be a multiple of conditioner.num_heads"
            raise ValueError(msg)
        return self


class Conditioner(nn.Module):
    """A ViT over the clean image: patches, learned positions, pre-norm blocks, a linear map out.

    The last linear layer starts at zero, so that training starts from all-zero tokens: for the tiny
    base exactly its unconditional mode, for Stable Diffusion cross-attention that adds its bias
    alone. The paper does not say how its conditioner starts.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        cross_attention_dim: int,
    ) -> None:
        """Random weights.

        Args:
            image_size: side of the pixels, a multiple of `patch_size`.
            patch_size: in pixels; (image_size / patch_size)^2 tokens.
            width: of the blocks.
            depth: number of blocks.
            num_heads: of each block.
            cross_attention_dim: width of the tokens that come out: the UNet's.

        Raises:
            ValueError: patches do not tile the image.
        """
        super().__init__()
        if image_size % patch_size:
            msg = (
                f"conditioner.patch_size: {patch_size} does not divide data.image_size {image_size}"
            )
            raise ValueError(msg)
        num_tokens = (image_size // patch_size) ** 2
        self.to_patches = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(width, num_heads=num_heads, mlp_ratio=4) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.to_tokens = nn.Linear(width, cross_attention_dim)
        nn.init.zeros_(self.to_tokens.weight)
        nn.init.zeros_(self.to_tokens.bias)

    def forward(self, pixels: Pixels) -> Tokens:
        """Images or Gaussian pixels => encoder_hidden_states."""
        patches = self.to_patches(pixels).flatten(2).transpose(1, 2)
        return self.to_tokens(self.norm(self.blocks(patches + self.positions)))


def drop_conditions(pixels: Pixels, *, dropped: Bool[Tensor, " batch"], noise: Pixels) -> Pixels:
    """Replace the images where `dropped` by Gaussian pixels, each image for itself.

    c(noise) is the paper's unconditional mode (App. A) and the null of classifier-free guidance.
    """
    return torch.where(dropped.view(-1, 1, 1, 1), noise, pixels)
