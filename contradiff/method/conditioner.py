"""The image conditioner: an image -> tokens for the UNet's cross-attention (Sec. 4.1, Fig. 2)."""

from typing import Literal

import torch
from jaxtyping import Bool
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.config import Section
from contradiff.method.transformer import Block
from contradiff.types import Conditions, Latents, Pixels, Tokens


class ConditionerParams(Section):
    """Section `conditioner`. The paper gives width 512 and the number of parameters only."""

    input: Literal["pixels", "latents"] = Field(
        description="what the ViT sees: the image (paper) or its latent"
    )
    patch_size: int = Field(ge=1, description="side of a patch, in pixels or latent positions")
    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    drop: float = Field(
        ge=0, lt=1, description="chance that a condition is Gaussian noise (App. A)"
    )
    cond_view: Literal["same", "crop", "noise"] = Field(
        description="same: one clean image for both views (paper) | crop: an independent crop for "
        "each | noise: as same, but the second view has the null condition"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ConditionerParams":
        if self.width % self.num_heads:
            raise ValueError("conditioner.width must be a multiple of conditioner.num_heads")
        return self


class Conditioner(nn.Module):
    """A ViT over the clean image: patches, learned positions, pre-norm blocks, a linear layer.

    With `input` "latents" it sees the clean latent instead, and training needs no pixels.

    The last linear layer starts at zero, so that all tokens are zero when training starts. For the
    tiny base this is its unconditional mode; for Stable Diffusion, cross-attention then adds only
    its bias. The paper does not say how its conditioner is initialised.
    """

    def __init__(
        self,
        *,
        input: Literal["pixels", "latents"],  # noqa: A002  # the parameter's name
        in_channels: int,
        size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        cross_attention_dim: int,
    ) -> None:
        """Initialise with random weights.

        Args:
            input: Whether `forward` takes pixels or latents.
            in_channels: Channels of the input, 3 for pixels.
            size: Side of the input, a multiple of `patch_size`.
            patch_size: Side of a patch; there are (size / patch_size)^2 tokens.
            width: Width of the blocks.
            depth: Number of blocks.
            num_heads: Heads of each block.
            cross_attention_dim: Width of the tokens that the UNet takes.
        """
        super().__init__()
        assert size % patch_size == 0, "rules.py refuses other sizes"
        self.input: Literal["pixels", "latents"] = input
        self.shape = (in_channels, size, size)
        num_tokens = (size // patch_size) ** 2
        self.to_patches = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(width, num_heads=num_heads, mlp_ratio=4) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.to_tokens = nn.Linear(width, cross_attention_dim)
        nn.init.zeros_(self.to_tokens.weight)
        nn.init.zeros_(self.to_tokens.bias)

    def choose(self, *, pixels: Pixels, latents: Latents) -> Conditions:
        """Return the pixels or the latents, whichever `forward` takes."""
        return pixels if self.input == "pixels" else latents

    def forward(self, conditions: Conditions) -> Tokens:
        """Pixels, scaled latents or Gaussian noise of their shape => encoder_hidden_states."""
        patches = self.to_patches(conditions).flatten(2).transpose(1, 2)
        return self.to_tokens(self.norm(self.blocks(patches + self.positions)))


def drop_conditions(
    conditions: Conditions, *, dropped: Bool[Tensor, " batch"], noise: Conditions
) -> Conditions:
    """Replace the images where `dropped` is true by Gaussian noise.

    c(noise) is the paper's unconditional mode (App. A), and the null condition of guidance.
    """
    return torch.where(dropped.view(-1, 1, 1, 1), noise, conditions)
