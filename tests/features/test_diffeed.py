"""Against the UNet's own pass, and its feedback written out."""

from pathlib import Path

import torch
from torch import Tensor

from contradiff.base.loading import load_unet
from contradiff.features.diffeed import blend, decoder_maps, encode_with_feedback, feedback_maps
from contradiff.method.unet import SplitUNet


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([5, 401]), torch.randn(2, 3, 16, generator=generator)


@torch.no_grad()
def test_without_feedback_it_is_the_unets_own_pass(tiny_base: Path):
    unet = load_unet(tiny_base)
    latents, steps, tokens = inputs()
    seen: list[Tensor] = []
    for block in unet.up_blocks:
        last = block.attentions[-1] if hasattr(block, "attentions") else block.resnets[-1]
        take = lambda *args: seen.append(args[2][0] if isinstance(args[2], tuple) else args[2])  # noqa: E731
        last.register_forward_hook(take)
    unet(latents, steps, encoder_hidden_states=tokens)
    own = list(seen)
    expected = SplitUNet(unet).down(latents, steps, tokens)
    encoded = encode_with_feedback(unet, latents, steps, tokens, feedback=None)
    assert torch.equal(encoded.bottleneck, expected.bottleneck)
    assert all(map(torch.equal, encoded.skips, expected.skips))
    maps = decoder_maps(unet, encoded, tokens)
    assert len(maps) == len(own) == 3
    assert all(map(torch.equal, maps, own))


@torch.no_grad()
def test_decoder_maps_have_the_mirrored_encoder_maps_shapes(tiny_base: Path):
    unet = load_unet(tiny_base)
    latents, steps, tokens = inputs()
    encoded = encode_with_feedback(unet, latents, steps, tokens, feedback=None)
    decoded = decoder_maps(unet, encoded, tokens)[::-1]
    # conv_in, then of each down block one layer and, but for the last, its downsampling
    before_downsampling = [encoded.skips[i] for i in (1, 3, 5)]
    assert [m.shape for m in decoded] == [m.shape for m in before_downsampling]


def test_blend_is_the_mean_with_a_map_of_equal_mean_and_deviation():
    generator = torch.Generator().manual_seed(0)
    maps, fed_back = torch.randn(2, 2, 3, 4, 4, generator=generator) * 3 + 1
    for ours, own, other in zip(blend(maps, 7 * fed_back - 2), maps, fed_back, strict=True):
        scaled = (other - other.mean()) / other.std() * own.std() + own.mean()
        torch.testing.assert_close(ours, (own + scaled) / 2)


@torch.no_grad()
def test_feedback_changes_the_second_pass(tiny_base: Path):
    unet = load_unet(tiny_base)
    latents, steps, tokens = inputs()
    maps = feedback_maps(unet, latents, steps, tokens)
    assert maps.shape == (2, 4 * 32, 2, 2)
    first_mid, first_up, second_mid, second_up = maps.split(32, dim=1)
    encoded = SplitUNet(unet).down(latents, steps, tokens)
    assert torch.equal(first_mid, encoded.bottleneck)
    assert (second_mid - first_mid).abs().max() > 1e-2
    assert (second_up - first_up).abs().max() > 1e-2
    # each image for itself
    alone = feedback_maps(unet, latents[1:], steps[1:], tokens[1:])
    torch.testing.assert_close(alone, maps[1:], atol=1e-5, rtol=1e-5)
