"""A second pass of the frozen denoiser that is fed its own decoder's maps (after DifFeed).

Mukhopadhyay et al., "Do text-free diffusion models learn discriminative visual representations?"
(2023), run a frozen guided-diffusion UNet on a noisy image; small convolutional layers carry maps
of its decoder back to the mirrored places of its encoder, which runs once more; an attention head
fuses several blocks of both passes and of several noise levels. Layers and head learn with labels.

*Deviation*: features are cached here and the UNet stays untouched, so that every model is judged
by one protocol. The feedback has no parameters: in this family of UNets the decoder's map before
each upsampling has the mirrored encoder map's very shape, is brought to its standard deviation and
averaged with it. All levels are fed back. The mid block and the second up block of both passes are
fused by a linear classifier of their pooled maps, or by an attention head that is trained on the
maps with labels (probe.head: attentive). The base is Stable Diffusion, its noise levels ours.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contradiff.method.unet import UNetState
from contradiff.types import Latents, Maps, Timesteps, Tokens

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

NUM_PASSES = 2
"""The first, and the one that is fed back to; of both the mid block and `up.1` are fused."""


def feedback_maps(
    unet: "UNet2DConditionModel", noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens
) -> Maps:
    """Mid block and second up block of both passes, stacked along the channels, on mid's grid."""
    first = encode_with_feedback(unet, noisy_latents, timesteps, tokens, feedback=None)
    decoded = decoder_maps(unet, first, tokens)
    second = encode_with_feedback(unet, noisy_latents, timesteps, tokens, feedback=decoded[::-1])
    decoded_again = decoder_maps(unet, second, tokens, num_blocks=2)
    height, width = first.bottleneck.shape[2:]
    fused = [first.bottleneck, decoded[1], second.bottleneck, decoded_again[1]]
    return torch.cat([F.adaptive_avg_pool2d(maps, (height, width)) for maps in fused], dim=1)


def encode_with_feedback(
    unet: "UNet2DConditionModel",
    noisy_latents: Latents,
    timesteps: Timesteps,
    tokens: Tokens,
    *,
    feedback: list[Tensor] | None,
) -> UNetState:
    """The first half of `unet.forward`, each down block's map averaged with what is fed back.

    Args:
        unet: the denoiser.
        noisy_latents: at `timesteps`.
        timesteps: of each.
        tokens: conditions.
        feedback: for each down block a map of the shape that it has before its downsampling; None:
            nothing is fed back.
    """
    time_embedding = unet.time_embedding(unet.get_time_embed(noisy_latents, timesteps))
    hidden = unet.conv_in(noisy_latents)
    skips = [hidden]
    for number, block in enumerate(unet.down_blocks):
        last = len(block.resnets) - 1  # pyright: ignore[reportArgumentType]
        for layer in range(last + 1):
            hidden = _layer(block, layer, hidden, time_embedding, tokens)
            if layer == last and feedback is not None:
                hidden = blend(hidden, feedback[number])
            skips.append(hidden)
        for downsampler in _samplers(block, "downsamplers"):
            hidden = downsampler(hidden)
            skips.append(hidden)
    bottleneck = unet.mid_block(hidden, time_embedding, encoder_hidden_states=tokens)
    return UNetState(bottleneck, bottleneck, tuple(skips), time_embedding, tokens)


def decoder_maps(
    unet: "UNet2DConditionModel",
    encoded: UNetState,
    tokens: Tokens,
    *,
    num_blocks: int | None = None,
) -> list[Tensor]:
    """Each up block's map before its upsampling, from the coarsest; of the first blocks or all."""
    hidden, skips = encoded.bottleneck, list(encoded.skips)
    maps: list[Tensor] = []
    for block in list(unet.up_blocks)[:num_blocks]:
        for layer in range(len(block.resnets)):  # pyright: ignore[reportArgumentType]
            joined = torch.cat([hidden, skips.pop()], dim=1)
            hidden = _layer(block, layer, joined, encoded.time_embedding, tokens)
        maps.append(hidden)
        for upsampler in _samplers(block, "upsamplers"):
            hidden = upsampler(hidden, skips[-1].shape[2:])
    return maps


def blend(maps: Maps, fed_back: Maps) -> Maps:
    """The mean of two maps, the second brought to the first's mean and deviation in each image."""
    dims = (1, 2, 3)
    scale = maps.std(dim=dims, keepdim=True) / fed_back.std(dim=dims, keepdim=True).clamp(min=1e-6)
    centred = (fed_back - fed_back.mean(dim=dims, keepdim=True)) * scale
    return (maps + centred + maps.mean(dim=dims, keepdim=True)) / 2


def _layer(block: Any, number: int, hidden: Tensor, time_embedding: Tensor, tokens: Tokens) -> Any:
    """One resnet of a block, and its attention where the block has any."""
    hidden = block.resnets[number](hidden, time_embedding)
    if getattr(block, "has_cross_attention", False):
        attention = block.attentions[number]
        hidden = attention(hidden, encoder_hidden_states=tokens, return_dict=False)[0]
    return hidden


def _samplers(block: Any, name: str) -> Any:
    return getattr(block, name, None) or ()
