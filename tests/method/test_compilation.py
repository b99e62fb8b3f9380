"""Compiled blocks, and bfloat16 weights, give the results of the plain float32 UNet."""

from copy import deepcopy
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from contradiff.base.loading import load_unet
from contradiff.method.compilation import compile_blocks
from contradiff.method.lora import add_lora, cast_frozen_weights
from contradiff.method.params import LoraParams

LORA = LoraParams(rank=4, alpha=8.0, targets=["attn2.to_q", "attn2.to_k", "attn2.to_v"])


@pytest.fixture
def unet(tiny_base: Path) -> nn.Module:
    unet = load_unet(tiny_base)
    add_lora(unet, LORA)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return unet


def outputs(unet: nn.Module, *, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """A prediction, and the gradient of LoRA's weights."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randn(2, 5, 16, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = unet(sample, torch.tensor([3, 700]), tokens).sample
    found.float().square().sum().backward()
    gradients = [p.grad.flatten() for p in unet.parameters() if p.grad is not None]
    return found.detach().float(), torch.cat(gradients)


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_bfloat16_weights_and_norms_are_as_close_to_float32_as_autocast(unet: nn.Module):
    exact, cast = outputs(deepcopy(unet)), deepcopy(unet)
    cast_frozen_weights(cast)
    kept = {n: p for n, p in cast.named_parameters() if p.dtype == torch.float32}
    assert all("lora_" in name for name in kept if "time_embedding" not in name)
    plain, quick = outputs(unet, bf16=True), outputs(cast, bf16=True)
    for found, autocast, wanted in zip(quick, plain, exact, strict=True):
        assert 0 < error(found, wanted) < max(0.02, 1.5 * error(autocast, wanted))


def test_norms_give_bfloat16_to_the_layers_behind_them(unet: nn.Module):
    cast_frozen_weights(unet)
    norm = next(module for module in unet.modules() if isinstance(module, nn.GroupNorm))
    seen: list[torch.dtype] = []
    norm.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    outputs(unet, bf16=True)
    assert seen == [torch.bfloat16]


def test_equal_blocks_are_compiled_once(monkeypatch: pytest.MonkeyPatch):
    """Also with bfloat16 norms: a function of its own for each norm would forbid sharing."""
    options = {"in_channels": 32, "temb_channels": 8}
    blocks = nn.ModuleList(ResnetBlock2D(**options).requires_grad_(False) for _ in range(3))
    cast_frozen_weights(blocks)
    graphs: list[nn.Module] = []

    def count(graph: nn.Module, _inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=count))
    compile_blocks(blocks)
    maps = torch.randn(1, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for block in blocks:
            maps = block(maps, torch.zeros(1, 8))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_blocks_compute_the_same(unet: nn.Module, *, bf16: bool):
    exact = outputs(deepcopy(unet))
    if bf16:
        cast_frozen_weights(unet)
    compiled = deepcopy(unet)
    compile_blocks(compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, plain = outputs(compiled, bf16=bf16), outputs(unet, bf16=bf16)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 2
    for ours, eager, wanted in zip(found, plain, exact, strict=True):
        assert error(ours, wanted) < (1.5 * error(eager, wanted) if bf16 else 1e-5)
