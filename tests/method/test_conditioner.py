"""Its size at the paper's scale, its start, and dropped conditions."""

from typing import Any

import pytest
import torch
from torch import nn

from contradiff.method.conditioner import Conditioner, ConditionerParams, drop_conditions

SIZES: dict[str, Any] = {
    "input": "pixels",
    "in_channels": 3,
    "size": 16,
    "patch_size": 4,
    "width": 8,
    "depth": 2,
    "num_heads": 2,
    "cross_attention_dim": 12,
}
PARAMS: dict[str, Any] = {
    "input": "pixels",
    "patch_size": 4,
    "width": 8,
    "depth": 2,
    "num_heads": 2,
    "drop": 0.1,
    "cond_view": "same",
}


@pytest.mark.parametrize(
    ("takes", "shape", "patch_size", "count"),
    [("pixels", (3, 256, 256), 16, 38_729_984), ("latents", (4, 32, 32), 2, 38_344_960)],
)
def test_parameter_count_at_the_papers_scale(
    takes: str, shape: tuple[int, int, int], patch_size: int, count: int
):
    with torch.device("meta"):
        conditioner = Conditioner(
            input=takes,  # pyright: ignore[reportArgumentType]
            in_channels=shape[0],
            size=shape[1],
            patch_size=patch_size,
            width=512,
            depth=12,
            num_heads=8,
            cross_attention_dim=768,
        )
        tokens = conditioner(torch.empty(2, *shape))
    assert sum(p.numel() for p in conditioner.parameters()) == count
    assert conditioner.shape == shape
    assert tokens.shape == (2, 256, 768)


def test_tokens_are_zero_at_the_start_and_can_be_learnt():
    torch.manual_seed(0)
    conditioner = Conditioner(**SIZES)
    tokens = conditioner(torch.randn(3, 3, 16, 16))
    assert tokens.shape == (3, 16, 12)
    assert not tokens.any()
    tokens.sum().backward()
    assert conditioner.to_tokens.weight.grad is not None
    assert conditioner.to_tokens.weight.grad.any()


@torch.no_grad()
def test_tokens_run_over_patches_row_by_row():
    """Without blocks, token 5 sees only the patch in row 1, column 1 (of 4 x 4)."""
    torch.manual_seed(0)
    conditioner = Conditioner(**SIZES | {"depth": 0})
    nn.init.normal_(conditioner.to_tokens.weight)
    pixels = torch.randn(1, 3, 16, 16)
    changed = pixels.clone()
    changed[:, :, 4:8, 4:8] += 1.0
    differs = (conditioner(pixels) != conditioner(changed)).any(dim=-1)[0]
    assert differs.nonzero().flatten().tolist() == [5]


@torch.no_grad()
def test_positions_tell_equal_patches_apart():
    torch.manual_seed(0)
    conditioner = Conditioner(**SIZES)
    nn.init.normal_(conditioner.to_tokens.weight)
    tokens = conditioner(torch.zeros(1, 3, 16, 16))[0]
    assert len(tokens.unique(dim=0)) == 16


def test_conditions_are_dropped_image_by_image():
    pixels, noise = torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)
    dropped = torch.tensor([True, False, False, True])
    result = drop_conditions(pixels, dropped=dropped, noise=noise)
    assert torch.equal(result[dropped], noise[dropped])
    assert torch.equal(result[~dropped], pixels[~dropped])


def test_heads_must_divide_the_width():
    ConditionerParams.model_validate(PARAMS)
    with pytest.raises(ValueError, match=r"conditioner\.width must be a multiple"):
        ConditionerParams.model_validate(PARAMS | {"num_heads": 3})
