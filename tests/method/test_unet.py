"""The two halves of the UNet give the same outputs as diffusers' complete pass."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from contradiff.method.params import MapBlock
from contradiff.method.unet import SplitUNet, block_channels

SHAPE = {
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """As in Stable Diffusion, the last down block and the first up block lack attention."""
    torch.manual_seed(0)
    return UNet2DConditionModel(block_out_channels=(16, 24, 32), **SHAPE).eval()


def draw_inputs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, height, width, generator=generator)
    return latents, torch.tensor([0, 401, 999]), torch.randn(3, 5, 8, generator=generator)


@pytest.mark.parametrize("block", ["mid", "up.1", "mid+up.1"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (12, 5)])
@torch.no_grad()
def test_a_pass_in_halves_is_the_unets_own(
    unet: UNet2DConditionModel, height: int, width: int, block: MapBlock
):
    """Outputs agree bit for bit, also at sizes that are not divisible. No block runs twice."""
    latents, timesteps, tokens = draw_inputs(height, width)
    seen: list[Tensor] = []
    for module in (unet.mid_block, unet.up_blocks[1]):
        module.register_forward_hook(lambda *args: seen.append(args[2]))
    whole = unet(latents, timesteps, encoder_hidden_states=tokens).sample
    mid, up = seen
    pooled = F.adaptive_avg_pool2d(up, mid.shape[2:])
    assert up.shape[1:] == (24, height, width)  # up.1 has 24 channels, mid has 32
    expected = {"mid": mid, "up.1": pooled, "mid+up.1": torch.cat([mid, pooled], dim=1)}[block]

    ran: list[int] = []
    for index, module in enumerate((*unet.up_blocks, unet.conv_out)):
        module.register_forward_hook(lambda *_, index=index: ran.append(index))
    split = SplitUNet(unet)
    state = split.down(latents, timesteps, tokens, blocks=[block])
    maps = split.maps(state, block)
    assert ran == ([] if block == "mid" else [0, 1])
    noise_pred = split.predict(state)
    assert ran == [0, 1, 2, 3]
    assert maps.equal(expected)
    assert maps.shape[1] == block_channels(unet, block)
    assert noise_pred.equal(whole)
    torch.testing.assert_close(split.predict(state[1:]), whole[1:])
