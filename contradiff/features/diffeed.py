"""A second pass of the frozen denoiser that is fed its own decoder's maps (after DifFeed).

Mukhopadhyay et al., "Do text-free diffusion models learn discriminative visual representations?"
(2023), run a frozen guided-diffusion UNet on a noisy image; small convolutional layers carry maps
of its decoder back to the mirrored places of its encoder, which runs once more; an attention head
fuses several blocks of both passes and of several noise levels. Layers and head learn with labels.

*Deviation*: features are cached and the UNet stays untouched, so that one protocol judges every
model. The feedback has no parameters: the decoder's map before each upsampling has the mirrored
encoder map's very shape, is brought to its standard deviation and averaged with it. A linear
classifier of pooled maps, or an attention head (probe.head: attentive), fuses the mid block and the
second up block of both passes. The base is Stable Diffusion, its noise levels ours.
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

NUM_PASSES = 2  # of both the mid block and `up.1` are fused


def feedback_maps(
    unet: "UNet2DConditionModel", noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens
) -> Maps:
    """Stack mid block and second up block of both passes along the channels, on mid's grid."""
    split, decoded = SplitUNet(unet), list[Maps]()
    handles = [
        _last_layer(block).register_forward_hook(lambda *call: decoded.append(_map_of(call[2])))
        for block in unet.up_blocks  # from the coarsest
    ]
    try:
        first = split.down(noisy_latents, timesteps, tokens, blocks=["up.1"])
        split.noise_pred(first)
        for block, maps in zip(unet.down_blocks, decoded[::-1], strict=True):
            feed = partial(_blended, maps)
            handles.append(_last_layer(block).register_forward_hook(feed))
        # Two more maps are decoded: this pass ends after the second up block.
        second = split.down(noisy_latents, timesteps, tokens, blocks=["up.1"])
    finally:
        for handle in handles:
            handle.remove()
    size = first.bottleneck.shape[2], first.bottleneck.shape[3]
    fused = [first.bottleneck, decoded[1], second.bottleneck, decoded[-1]]
    return torch.cat([F.adaptive_avg_pool2d(maps, size) for maps in fused], dim=1)


def blend(maps: Maps, fed_back: Maps) -> Maps:
    """Average two maps, the second brought to the first's mean and deviation in each image."""
    dims = (1, 2, 3)
    scale = maps.std(dim=dims, keepdim=True) / fed_back.std(dim=dims, keepdim=True).clamp(min=1e-6)
    centred = (fed_back - fed_back.mean(dim=dims, keepdim=True)) * scale
    return (maps + centred + maps.mean(dim=dims, keepdim=True)) / 2


def _last_layer(block: Any) -> nn.Module:
    """Return the module whose output is the block's map before it is sampled up or down."""
    has_attention = getattr(block, "has_cross_attention", False)
    return (block.attentions if has_attention else block.resnets)[-1]


def _map_of(output: Any) -> Tensor:
    """Return the map: an attention gives a tuple, a resnet the map itself."""
    return output[0] if isinstance(output, tuple) else output


def _blended(fed_back: Maps, *call: Any) -> Any:
    """Blend a layer's output (a forward hook's last argument) with a map."""
    blended = blend(_map_of(call[2]), fed_back)
    return (blended,) if isinstance(call[2], tuple) else blended
