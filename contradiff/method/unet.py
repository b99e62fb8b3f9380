"""The halves of the base's UNet: down to the bottleneck, and up to the predicted noise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contradiff.types import Latents, Maps, Timesteps, Tokens

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


MapBlock = Literal["mid", "up.1", "mid+up.1"]
"""Where in the UNet the maps come from: the mid block, the second up block, or both."""


NUM_UP_BLOCKS: dict[MapBlock, int] = {"mid": 0, "up.1": 2, "mid+up.1": 2}
"""How many up blocks run before the maps are there."""


@dataclass(frozen=True)
class Encoded:
    """The UNet's state after the mid block or a later one: all that the rest of the pass needs.

    Attributes:
        bottleneck: the mid block's output.
        hidden: the last block's output; the bottleneck, if no up block has run.
        skips: what the up blocks yet to come will take.
        time_embedding: what they see of the timestep.
        num_up_blocks: how many up blocks have run.
    """

    bottleneck: Maps
    hidden: Float[Tensor, "batch width_h h_h w_h"]
    skips: tuple[Tensor, ...]
    time_embedding: Float[Tensor, "batch width_t"]
    num_up_blocks: int

    def __getitem__(self, rows: slice) -> "Encoded":
        """The state of some of the batch's rows."""
        return Encoded(
            self.bottleneck[rows],
            self.hidden[rows],
            tuple(skip[rows] for skip in self.skips),
            self.time_embedding[rows],
            self.num_up_blocks,
        )


def encode_to_bottleneck(
    unet: "UNet2DConditionModel", noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens
) -> Encoded:
    """The first half of `unet.forward`: down blocks and mid block.

    The up blocks, 68% of a pass of Stable Diffusion's UNet, are not run.
    """
    time_embedding = unet.time_embedding(unet.get_time_embed(noisy_latents, timesteps))
    hidden = unet.conv_in(noisy_latents)
    skips = (hidden,)
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            hidden, states = block(hidden, temb=time_embedding, encoder_hidden_states=tokens)
        else:
            hidden, states = block(hidden, temb=time_embedding)
        skips += states
    bottleneck = unet.mid_block(hidden, time_embedding, encoder_hidden_states=tokens)
    return Encoded(bottleneck, bottleneck, skips, time_embedding, num_up_blocks=0)


def decode_from_bottleneck(
    unet: "UNet2DConditionModel", encoded: Encoded, tokens: Tokens
) -> Latents:
    """The rest of `unet.forward`: the up blocks yet to come and the output => predicted noise."""
    hidden = advance(unet, encoded, tokens, num_up_blocks=len(unet.up_blocks)).hidden
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))  # pyright: ignore[reportOptionalCall]


def advance(
    unet: "UNet2DConditionModel", encoded: Encoded, tokens: Tokens, *, num_up_blocks: int
) -> Encoded:
    """Run up blocks until `num_up_blocks` have run in all; those that have are not run again."""
    hidden, skips = encoded.hidden, encoded.skips
    for block in list(unet.up_blocks)[encoded.num_up_blocks : num_up_blocks]:
        resnets = block.resnets
        assert isinstance(resnets, nn.ModuleList)
        states, skips = skips[-len(resnets) :], skips[: -len(resnets)]
        size = skips[-1].shape[2:] if skips else None
        if getattr(block, "has_cross_attention", False):
            hidden = block(
                hidden,
                temb=encoded.time_embedding,
                res_hidden_states_tuple=states,
                encoder_hidden_states=tokens,
                upsample_size=size,
            )
        else:
            hidden = block(
                hidden,
                temb=encoded.time_embedding,
                res_hidden_states_tuple=states,
                upsample_size=size,
            )
    num_up_blocks = max(num_up_blocks, encoded.num_up_blocks)
    return replace(encoded, hidden=hidden, skips=skips, num_up_blocks=num_up_blocks)


def block_maps(
    unet: "UNet2DConditionModel", encoded: Encoded, tokens: Tokens, *, block: MapBlock
) -> Maps:
    """The maps that the tri-timestep attention reads, on the bottleneck's grid.

    Deviation: the paper reads the mid block alone. `up.1` has a finer grid (for Stable
    Diffusion four times the bottleneck's sides, 1280 channels) and is averaged down to it, so that
    the attention has as many positions.

    Args:
        unet: the denoiser.
        encoded: its state after the mid block, or `advance`d by `NUM_UP_BLOCKS` already.
        tokens: the conditions that it was encoded with.
        block: "mid" runs no up block; the others run the first two and no more. "mid+up.1" stacks
            the channels of both, the mid block's first.

    Returns:
        As many channels as `block_channels` says.
    """
    return maps_of_blocks(unet, encoded, tokens, blocks=[block])[block]


def maps_of_blocks(
    unet: "UNet2DConditionModel", encoded: Encoded, tokens: Tokens, *, blocks: Sequence[MapBlock]
) -> dict[MapBlock, Maps]:
    """As `block_maps`, of several blocks of one pass; the up blocks are run once, if at all."""
    maps: dict[MapBlock, Maps] = {"mid": encoded.bottleneck}
    if any(block != "mid" for block in blocks):
        num_up_blocks = max(NUM_UP_BLOCKS[block] for block in blocks)
        hidden = advance(unet, encoded, tokens, num_up_blocks=num_up_blocks).hidden
        height, width = encoded.bottleneck.shape[2:]
        maps["up.1"] = F.adaptive_avg_pool2d(hidden, (height, width))
        maps["mid+up.1"] = torch.cat([maps["mid"], maps["up.1"]], dim=1)
    return {block: maps[block] for block in blocks}


def block_channels(unet: "UNet2DConditionModel", block: MapBlock) -> int:
    """Channels of `block_maps`: 1280 of each block of Stable Diffusion.

    Raises:
        ValueError: the UNet has no second up block; names head.block.
    """
    widths: Sequence[int] = unet.config["block_out_channels"][::-1]
    if block == "mid":
        return widths[0]
    if len(unet.up_blocks) < 2:
        raise ValueError(
            f"head.block: {block} reads the UNet's second up block, but the base has "
            f"{len(unet.up_blocks)}; set it to mid"
        )
    return widths[1] if block == "up.1" else widths[0] + widths[1]


class SelfCondition(nn.Module):
    """Self-conditioning of the denoiser on its own bottleneck (after DDAE++, Xiang et al., 2025).

    The pooled bottleneck goes through a linear layer into the time embedding that the up blocks
    see, so that the reconstruction loss itself asks the bottleneck for what the whole image is.
    The layer starts at zero. The paper has none. The other such idea, self-distillation from
    shallow to deep blocks (SRA), needs a second loss, a teacher and a further pass.
    """

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        """Make the layer that fits a UNet's bottleneck and time embedding."""
        super().__init__()
        widths = unet.config["block_out_channels"]
        self.to_time = nn.Linear(widths[-1], 4 * widths[0])
        nn.init.zeros_(self.to_time.weight)
        nn.init.zeros_(self.to_time.bias)

    def forward(self, encoded: Encoded) -> Encoded:
        """The state with another time embedding for the up blocks."""
        pooled = encoded.bottleneck.mean(dim=(2, 3))
        return replace(encoded, time_embedding=encoded.time_embedding + self.to_time(pooled))
