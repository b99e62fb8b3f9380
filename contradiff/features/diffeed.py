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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contradiff.method.unet import SplitUNet
from contradiff.types import Latents, Maps, Timesteps, Tokens

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

NUM_PASSES = 2
"""The first, and the one that is fed back to; of both the mid block and `up.1` are fused."""


def feedback_maps(
    unet: "UNet2DConditionModel", noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens
) -> Maps:
    """Mid block and second up block of both passes, stacked along the channels, on mid's grid."""
    middle, decoded = one_pass(unet, noisy_latents, timesteps, tokens)
    middle_again, decoded_again = one_pass(
        unet, noisy_latents, timesteps, tokens, feedback=decoded[::-1]
    )
    size = middle.shape[2], middle.shape[3]
    fused = [middle, decoded[1], middle_again, decoded_again[1]]
    return torch.cat([F.adaptive_avg_pool2d(maps, size) for maps in fused], dim=1)


def one_pass(
    unet: "UNet2DConditionModel",
    noisy_latents: Latents,
    timesteps: Timesteps,
    tokens: Tokens,
    *,
    feedback: Sequence[Tensor] = (),
) -> tuple[Maps, list[Tensor]]:
    """The UNet's pass, each down block's map averaged with what is fed back.

    Args:
        unet: the denoiser.
        noisy_latents: at `timesteps`.
        timesteps: of each latent.
        tokens: conditions.
        feedback: for each down block a map of the shape that it has before its downsampling; such a
            pass ends after the second up block. None: nothing is fed back.

    Returns:
        The bottleneck, and each up block's map before its upsampling, from the coarsest.
    """
    decoded: list[Tensor] = []
    handles = [
        _last_layer(block).register_forward_hook(
            lambda *call, fed_back=maps: _blended(call[2], fed_back)
        )
        for block, maps in zip(unet.down_blocks, feedback, strict=False)
    ]
    handles += [
        _last_layer(block).register_forward_hook(lambda *call: decoded.append(_map_of(call[2])))
        for block in unet.up_blocks
    ]
    try:
        split = SplitUNet(unet)
        state = split.down(noisy_latents, timesteps, tokens, blocks=["up.1"])
        if not feedback:
            split.noise_pred(state)
    finally:
        for handle in handles:
            handle.remove()
    return state.bottleneck, decoded


def blend(maps: Maps, fed_back: Maps) -> Maps:
    """The mean of two maps, the second brought to the first's mean and deviation in each image."""
    dims = (1, 2, 3)
    scale = maps.std(dim=dims, keepdim=True) / fed_back.std(dim=dims, keepdim=True).clamp(min=1e-6)
    centred = (fed_back - fed_back.mean(dim=dims, keepdim=True)) * scale
    return (maps + centred + maps.mean(dim=dims, keepdim=True)) / 2


def _last_layer(block: Any) -> nn.Module:
    """The module whose output is the block's map before it is sampled up or down."""
    has_attention = getattr(block, "has_cross_attention", False)
    return (block.attentions if has_attention else block.resnets)[-1]


def _map_of(output: Any) -> Tensor:
    """An attention gives a tuple, a resnet the map itself."""
    return output[0] if isinstance(output, tuple) else output


def _blended(output: Any, fed_back: Tensor) -> Any:
    blended = blend(_map_of(output), fed_back)
    return (blended,) if isinstance(output, tuple) else blended
