"""The base's UNet in two halves: down to the bottleneck, and up to the predicted noise or v."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contradiff.method.microbatches import mean_in_microbatches
from contradiff.method.params import MapBlock
from contradiff.types import Latents, Maps, Timesteps, Tokens

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


_NUM_UP_BLOCKS: dict[MapBlock, int] = {"mid": 0, "up.1": 2, "mid+up.1": 2}
"""Number of up blocks that must run to compute the maps."""


@dataclass(frozen=True)
class UNetState:
    """A forward pass of the UNet, paused after the mid block and `num_up_blocks` up blocks."""

    bottleneck: Maps
    """Output of the mid block."""
    hidden: Float[Tensor, "batch width_h h_h w_h"]
    """Output of the last block that has run."""
    skips: tuple[Tensor, ...]
    """Inputs of the up blocks that have not run yet."""
    time_embedding: Float[Tensor, "batch width_t"]
    encoder_hidden_states: Tokens
    num_up_blocks: int = 0

    def __getitem__(self, rows: slice) -> "UNetState":
        """Return the state for some rows (images) of the batch."""
        skips = tuple(skip[rows] for skip in self.skips)
        seen = self.time_embedding[rows], self.encoder_hidden_states[rows]
        return UNetState(self.bottleneck[rows], self.hidden[rows], skips, *seen, self.num_up_blocks)


class SplitUNet:
    """A wrapper that can pause a forward pass of `unet`, read its maps, and continue it."""

    def __init__(
        self, unet: "UNet2DConditionModel", self_condition: "SelfCondition | None" = None
    ) -> None:
        self.unet, self.self_condition = unet, self_condition

    def down(
        self,
        noisy_latents: Latents,
        timesteps: Timesteps,
        encoder_hidden_states: Tokens,
        *,
        blocks: Sequence[MapBlock] = (),
    ) -> UNetState:
        """Run the down blocks, the mid block, and as many up blocks as the maps of `blocks` need.

        The maps of "mid" need no up block. In Stable Diffusion, up blocks are 68% of a pass.
        """
        unet, tokens = self.unet, encoder_hidden_states
        time_embedding = unet.time_embedding(unet.get_time_embed(noisy_latents, timesteps))
        hidden = unet.conv_in(noisy_latents)
        skips = (hidden,)
        for block in unet.down_blocks:
            hidden, states = block(hidden, temb=time_embedding, **_attended(block, tokens))
            skips += states
        mid_block = unet.mid_block
        bottleneck = mid_block(hidden, time_embedding, **_attended(mid_block, tokens))
        if self.self_condition is not None:
            time_embedding = time_embedding + self.self_condition(bottleneck)
        state = UNetState(bottleneck, bottleneck, skips, time_embedding, tokens)
        return self._up(state, max((_NUM_UP_BLOCKS[block] for block in blocks), default=0))

    def maps(self, state: UNetState, block: MapBlock) -> Maps:
        """Return the maps f(z_t) of `block`, at the size of the mid block's output.

        `down` must have been called with this block. *Deviation*: the paper uses only "mid". The
        larger output of "up.1" (in Stable Diffusion, its sides are four times as long) is averaged
        to the size of "mid". "mid+up.1" stacks the channels of "mid", then those of "up.1".
        """
        if block == "mid":
            return state.bottleneck
        assert state.num_up_blocks == _NUM_UP_BLOCKS[block], "call `down` with this block first"
        height, width = state.bottleneck.shape[2:]
        maps = F.adaptive_avg_pool2d(state.hidden, (height, width))
        return maps if block == "up.1" else torch.cat([state.bottleneck, maps], dim=1)

    def predict(self, state: UNetState) -> Latents:
        """Run the remaining up blocks and the output layers; return the predicted noise or v."""
        hidden = self._up(state, len(self.unet.up_blocks)).hidden
        return self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(hidden)))  # pyright: ignore[reportOptionalCall]

    def mean_loss(
        self, state: UNetState, loss_of: Callable[[Latents, slice], Tensor], microbatch_size: int
    ) -> Float[Tensor, ""]:
        """Return the mean loss of the prediction, computed a few rows at a time.

        `loss_of` gets the prediction for some rows and the slice of these rows, and returns
        their mean loss. To save memory, only `microbatch_size` rows (0: all) run at once through
        the up blocks, and their gradient is computed before the next rows run.
        """
        num_rows = len(state.hidden)
        if not 0 < microbatch_size < num_rows or not torch.is_grad_enabled():
            return loss_of(self.predict(state), slice(0, num_rows))

        def loss_of_rows(
            rows: slice, hidden: Tensor, time_embedding: Tensor, tokens: Tensor, *skips: Tensor
        ) -> Tensor:
            mid, ran = state.bottleneck[rows], state.num_up_blocks
            paused = UNetState(mid, hidden, skips, time_embedding, tokens, ran)
            return loss_of(self.predict(paused), rows)

        to_run = list(self.unet.up_blocks)[state.num_up_blocks :]
        modules = [*to_run, self.unet.conv_norm_out, self.unet.conv_out]
        trained = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
        inputs = (state.hidden, state.time_embedding, state.encoder_hidden_states, *state.skips)
        return mean_in_microbatches(loss_of_rows, inputs, trained, microbatch_size=microbatch_size)

    def _up(self, state: UNetState, num_up_blocks: int) -> UNetState:
        """Run up blocks until `num_up_blocks` of them have run in total."""
        hidden, skips = state.hidden, state.skips
        for block in list(self.unet.up_blocks)[state.num_up_blocks : num_up_blocks]:
            resnets = block.resnets
            assert isinstance(resnets, nn.ModuleList)
            states, skips = skips[-len(resnets) :], skips[: -len(resnets)]
            given = {"temb": state.time_embedding, "res_hidden_states_tuple": states}
            size = skips[-1].shape[2:] if skips else None
            given |= _attended(block, state.encoder_hidden_states)
            hidden = block(hidden, upsample_size=size, **given)
        return replace(state, hidden=hidden, skips=skips, num_up_blocks=num_up_blocks)


def _attended(block: nn.Module, tokens: Tokens) -> dict[str, Tokens]:
    """Return `tokens` as a keyword argument if the block has cross-attention, else no argument."""
    has_attention = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": tokens} if has_attention else {}


def block_channels(unet: "UNet2DConditionModel", block: MapBlock) -> int:
    """Return the number of channels of `SplitUNet.maps`; Stable Diffusion's blocks have 1280."""
    widths: Sequence[int] = unet.config["block_out_channels"][::-1]
    if block == "mid":
        return widths[0]
    assert len(unet.up_blocks) > 1, "rules.py refuses a base with one up block"
    return widths[1] if block == "up.1" else widths[0] + widths[1]


class SelfCondition(nn.Module):
    """A layer that shows the mid block's output to the up blocks (DDAE++, Xiang et al., 2025).

    A linear layer projects the mid block's pooled output, and the result is added to the up blocks'
    time embedding. The reconstruction loss thus trains the mid block to describe the complete
    image. The layer starts at zero. The paper has no such layer.
    """

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        super().__init__()
        width = unet.time_embedding.linear_2.out_features
        self.to_time = nn.Linear(unet.config["block_out_channels"][-1], width)
        nn.init.zeros_(self.to_time.weight)
        nn.init.zeros_(self.to_time.bias)

    def forward(self, bottleneck: Maps) -> Float[Tensor, "batch width_t"]:
        """Return the vector to add to the time embedding."""
        return self.to_time(bottleneck.mean(dim=(2, 3)))
