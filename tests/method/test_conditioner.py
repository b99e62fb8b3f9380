"""The conditioner's initial weights, and which patches its tokens see."""

from typing import Any

import pytest
import torch
from torch import nn

from contradiff.method.conditioner import Conditioner
from contradiff.method.params import ConditionerParams

SHAPE = {"patch_size": 4, "width": 8, "depth": 2, "num_heads": 2}
PARAMS: dict[str, Any] = SHAPE | {"input": "pixels", "drop": 0.1, "cond_view": "same"}


def build(**changes: Any) -> Conditioner:
    torch.manual_seed(0)
    params = ConditionerParams.model_validate(PARAMS).model_copy(update=changes)
    return Conditioner(params, in_channels=3, size=16, cross_attention_dim=12)


def test_tokens_are_zero_at_the_start_and_can_be_learnt():
    conditioner = build()
    tokens = conditioner(torch.randn(3, 3, 16, 16))
    assert tokens.shape == (3, 16, 12)
    assert not tokens.any()
    tokens.sum().backward()
    assert conditioner.to_tokens.weight.grad is not None
    assert conditioner.to_tokens.weight.grad.any()


@torch.no_grad()
def test_tokens_run_over_patches_row_by_row():
    """Without blocks, token 5 sees only the patch in row 1, column 1 (of 4 x 4 from 0)."""
    conditioner = build(depth=0)
    nn.init.normal_(conditioner.to_tokens.weight)
    pixels = torch.randn(1, 3, 16, 16)
    changed = pixels.clone()
    changed[:, :, 4:8, 4:8] += 1.0
    differs = (conditioner(pixels) != conditioner(changed)).any(dim=-1)[0]
    assert differs.nonzero().flatten().tolist() == [5]
    # Position embeddings make the tokens of equal patches differ.
    assert len(conditioner(torch.zeros(1, 3, 16, 16))[0].unique(dim=0)) == 16


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"conditioner\.width must be a multiple"):
        ConditionerParams.model_validate(PARAMS | {"num_heads": 3})
