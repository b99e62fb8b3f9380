"""With the cache, noise predictions are the same, and tokens are projected only once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from contradiff.generation.cross_attention_cache import cache_keys_and_values
from contradiff.method.lora import merge_lora
from contradiff.method.model import ContraDiffModel


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(model: ContraDiffModel, timestep: int, tokens: Tensor) -> Tensor:
    return model.predict(draw(2, 4, 8, 8, seed=0), torch.full((2,), timestep), tokens)


@pytest.fixture
def model(build_tiny: Callable[..., ContraDiffModel]) -> ContraDiffModel:
    return build_tiny()


@pytest.mark.parametrize("merged", [True, False])
@torch.no_grad()
def test_nothing_changes_whichever_tokens_come(model: ContraDiffModel, merged: bool):
    if merged:
        merge_lora(model.unet)
    first, second = draw(2, 16, 16, seed=1), draw(2, 16, 16, seed=2)
    order = [(900, first), (600, first), (600, second), (300, first), (1, first.clone())]
    expected = [predict(model, *item) for item in order]
    with cache_keys_and_values(model.unet):
        kept = [predict(model, *item) for item in order]
    assert all(map(torch.equal, kept, expected))
    assert not torch.equal(expected[1], expected[2])


@torch.no_grad()
def test_tokens_are_projected_once(model: ContraDiffModel):
    merge_lora(model.unet)
    calls: list[str] = []
    for name, module in model.unet.named_modules():
        if isinstance(module, nn.Linear) and ("attn2.to_k" in name or "attn2.to_v" in name):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    tokens = draw(2, 16, 16, seed=1)
    predict(model, 900, tokens)
    once = len(calls)
    assert once == 7 * 2
    with cache_keys_and_values(model.unet):
        for timestep in (900, 600, 300):
            predict(model, timestep, tokens)
    assert len(calls) == 2 * once
    # the `with` block removes the cache at its end, also after an error
    with pytest.raises(TypeError), cache_keys_and_values(model.unet):
        predict(model, None, tokens)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        predict(model, 900, tokens)
    assert len(calls) == 4 * once
