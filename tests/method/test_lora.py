"""LoRA equals its formula."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from contradiff.base.loading import load_unet
from contradiff.method.lora import add_lora, merge_lora
from contradiff.method.lora_layer import LinearWithLora
from contradiff.method.params import LoraParams


def lora(*, rank: int, alpha: float) -> LoraParams:
    return LoraParams(rank=rank, alpha=alpha, targets=["attn2.to_q", "attn2.to_k", "attn2.to_v"])


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
    }


def randomise_lora(unet: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def test_lora_is_alpha_over_rank_times_b_a(tiny_base: Path, inputs: dict[str, Tensor]):
    """Compare with a UNet to whose weights the update is added by hand."""
    unet, by_hand = load_unet(tiny_base), load_unet(tiny_base)
    before = by_hand(**inputs).sample
    add_lora(unet, lora(rank=4, alpha=6.0))
    assert unet(**inputs).sample.equal(before)  # before training, LoRA changes nothing
    randomise_lora(unet)
    weights = dict(unet.named_parameters())
    for name, parameter in by_hand.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in weights:
            update = weights[f"{layer}.lora_B.default.weight"]
            update = update @ weights[f"{layer}.lora_A.default.weight"]
            parameter.add_(6 / 4 * update)
    after = by_hand(**inputs).sample
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(unet(**inputs).sample, after, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_merged_lora_is_the_same_function(tiny_base: Path, inputs: dict[str, Tensor]):
    unet = load_unet(tiny_base)
    add_lora(unet, lora(rank=4, alpha=8.0))
    randomise_lora(unet)
    unmerged = unet(**inputs).sample
    merge_lora(unet)
    torch.testing.assert_close(unet(**inputs).sample, unmerged, rtol=1e-4, atol=1e-5)
    # After merging, the factors A and B have no effect.
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.zero_()
    torch.testing.assert_close(unet(**inputs).sample, unmerged, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_pefts_layer(tiny_base: Path, inputs: dict[str, Tensor]):
    """The same modules run with our forward pass and with peft's own."""
    unet = load_unet(tiny_base)
    add_lora(unet, lora(rank=4, alpha=6.0))
    randomise_lora(unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    tokens = inputs["encoder_hidden_states"].requires_grad_()

    def run(*, bf16: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = unet(**inputs).sample.float()
        found = torch.autograd.grad(output.square().sum(), [*trained, tokens])
        return torch.cat([each.flatten() for each in (output.detach(), *found)])

    ours, ours_bf16 = run(bf16=False), run(bf16=True)
    layers = [each for each in unet.modules() if isinstance(each, LinearWithLora)]
    assert len(layers) >= 3
    for layer in layers:
        object.__setattr__(layer, "__class__", Linear)
    theirs, theirs_bf16 = run(bf16=False), run(bf16=True)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert ours_bf16.equal(theirs_bf16)


def test_layer_takes_what_pefts_layer_takes(tiny_base: Path):
    unet = load_unet(tiny_base)
    add_lora(unet, lora(rank=4, alpha=6.0))
    randomise_lora(unet)
    layer = next(each for each in unet.modules() if isinstance(each, LinearWithLora))
    weights = [p.clone() for p in layer.parameters()]
    inputs = [torch.randn(*shape, 16) for shape in ((), (0,), (2, 0, 3), (2, 3))]
    inputs.append(torch.randn(16, 3, 2).transpose(0, 2))
    for given in inputs:
        before, output = given.clone(), layer(given)
        torch.testing.assert_close(output, Linear.forward(layer, given))
        assert given.equal(before)
        output.sum().backward()
    assert all(p.equal(w) for p, w in zip(layer.parameters(), weights, strict=True))
