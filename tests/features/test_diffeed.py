"""Both passes must equal the UNet's pass and feedback written out layer by layer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contradiff.base.loading import load_unet
from contradiff.features.diffeed import blend, feedback_maps
from contradiff.method.unet import SplitUNet


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([5, 401]), torch.randn(2, 3, 16, generator=generator)


def transcription(
    unet: Any, latents: Tensor, steps: Tensor, tokens: Tensor, feedback: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Run `unet.forward` layer by layer; return the bottleneck and the maps before upsampling."""

    def layer(block: Any, number: int, hidden: Tensor) -> Tensor:
        hidden = block.resnets[number](hidden, time)
        if hasattr(block, "attentions"):
            attend = block.attentions[number]
            hidden = attend(hidden, encoder_hidden_states=tokens, return_dict=False)[0]
        return hidden

    time = unet.time_embedding(unet.get_time_embed(latents, steps))
    hidden = unet.conv_in(latents)
    skips = [hidden]
    for number, block in enumerate(unet.down_blocks):
        hidden = layer(block, 0, hidden)
        if feedback is not None:
            hidden = blend(hidden, feedback[number])
        skips.append(hidden)
        if block.downsamplers:
            hidden = block.downsamplers[0](hidden)
            skips.append(hidden)
    bottleneck = hidden = unet.mid_block(hidden, time, encoder_hidden_states=tokens)
    maps = []
    for block in unet.up_blocks:
        for number in range(len(block.resnets)):
            hidden = layer(block, number, torch.cat([hidden, skips.pop()], dim=1))
        maps.append(hidden)
        if block.upsamplers:
            hidden = block.upsamplers[0](hidden, skips[-1].shape[2:])
    return bottleneck, maps


@torch.no_grad()
def test_both_passes_equal_a_transcription(tiny_base: Path):
    unet = load_unet(tiny_base)
    bottleneck, maps = transcription(unet, *inputs(), None)
    again = transcription(unet, *inputs(), maps[::-1])
    pool, size = torch.nn.functional.adaptive_avg_pool2d, bottleneck.shape[2:]
    fused = bottleneck, maps[1], again[0], again[1][1]
    expected = torch.cat([pool(found, size) for found in fused], dim=1)
    assert feedback_maps(unet, *inputs()).equal(expected)
    assert (again[0] - bottleneck).abs().max() > 1e-2
    # the UNet is unchanged, and an image's maps do not depend on the other images
    assert bottleneck.equal(SplitUNet(unet).down(*inputs()).bottleneck)
    alone = feedback_maps(unet, *(each[1:] for each in inputs()))
    torch.testing.assert_close(alone, expected[1:], atol=1e-5, rtol=1e-5)


def test_blend_is_the_mean_with_a_map_of_equal_mean_and_deviation():
    maps, fed_back = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for ours, own, other in zip(blend(maps, 7 * fed_back - 2), maps, fed_back, strict=True):
        scaled = (other - other.mean()) / other.std() * own.std() + own.mean()
        torch.testing.assert_close(ours, (own + scaled) / 2)
