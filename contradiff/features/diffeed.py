"""DifFeed, a baseline: the frozen UNet runs twice, and its decoder's maps feed the second pass.

Mukhopadhyay et al., "Do text-free diffusion models learn discriminative visual representations?"
(2023), run a frozen guided-diffusion UNet on a noisy image. Small convolutional layers carry maps
of the decoder back to the mirrored places of the encoder. Then the UNet runs again. An attention
head combines blocks of both passes and several noise levels. Layers and head are trained on labels.

*Deviation*: nothing is trained here, so that one probe can test the features of every model. Each
map of the decoder is scaled to the mean and standard deviation of the mirrored map of the encoder.
Then these two maps are averaged. The features are maps of the mid block and of the second up block,
of both passes. The UNet is the base's, and the noise levels are features.timesteps.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contradiff.method.unet import SplitUNet
from contradiff.types import Latents, Maps, Timesteps, Tokens

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

NUM_PASSES = 2  # passes of the UNet; each gives maps of the mid block and of `up.1`


def feedback_maps(
    unet: "UNet2DConditionModel", noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens
) -> Maps:
    """Concatenate both passes' maps of the mid and second up block, at the mid block's size."""
    split, decoded = SplitUNet(unet), list[Maps]()
    handles = [
        _last_layer(block).register_forward_hook(lambda *call: decoded.append(_map_of(call[2])))
        for block in unet.up_blocks  # the coarsest block comes first
    ]
    try:
        first = split.down(noisy_latents, timesteps, tokens, blocks=["up.1"])
        split.predict(first)
        for block, maps in zip(unet.down_blocks, decoded[::-1], strict=True):
            feed = partial(_blended, maps)
            handles.append(_last_layer(block).register_forward_hook(feed))
        # This pass ends after the second up block, so it appends only two maps to `decoded`.
        second = split.down(noisy_latents, timesteps, tokens, blocks=["up.1"])
    finally:
        for handle in handles:
            handle.remove()
    size = first.bottleneck.shape[2], first.bottleneck.shape[3]
    fused = [first.bottleneck, decoded[1], second.bottleneck, decoded[-1]]
    return torch.cat([F.adaptive_avg_pool2d(maps, size) for maps in fused], dim=1)


def blend(maps: Maps, fed_back: Maps) -> Maps:
    """Scale `fed_back` to the mean and deviation of `maps` for each image; average the two."""
    dims = (1, 2, 3)
    scale = maps.std(dim=dims, keepdim=True) / fed_back.std(dim=dims, keepdim=True).clamp(min=1e-6)
    centred = (fed_back - fed_back.mean(dim=dims, keepdim=True)) * scale
    return (maps + centred + maps.mean(dim=dims, keepdim=True)) / 2


def _last_layer(block: Any) -> nn.Module:
    """Return the module whose output is the block's map before down- or upsampling."""
    has_attention = getattr(block, "has_cross_attention", False)
    return (block.attentions if has_attention else block.resnets)[-1]


def _map_of(output: Any) -> Tensor:
    """Return the map of a layer's output, which is a tuple for attention layers."""
    return output[0] if isinstance(output, tuple) else output


def _blended(fed_back: Maps, *call: Any) -> Any:
    """Blend `fed_back` with a layer's output, which is the last argument of a forward hook."""
    blended = blend(_map_of(call[2]), fed_back)
    return (blended,) if isinstance(call[2], tuple) else blended
