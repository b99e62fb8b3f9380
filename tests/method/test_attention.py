"""The attention equals Eq. 4, computed with loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.method.attention import HeadParams, TriTimestepAttention, order_by_noise


def test_order_by_noise_sorts_each_image_from_noisiest_to_cleanest():
    timesteps = torch.tensor([[101, 7, 5], [401, 8, 5], [201, 900, 3]])
    # Channel 0 of a map is its timestep, and channel 1 is the number of its draw.
    draws = torch.arange(3).view(3, 1).expand(3, 3)
    maps = torch.stack([timesteps, draws], dim=2).float().view(3, 3, 2, 1, 1).repeat(1, 1, 1, 2, 2)
    ordered = order_by_noise(maps, timesteps)
    assert ordered.shape == (3, 3, 2, 2, 2)
    assert ordered[:, :, 0, 0, 0].tolist() == [[401, 201, 101], [900, 8, 7], [5, 5, 3]]
    # Maps of equal timesteps keep their order.
    assert ordered[:, :, 1, 1, 1].tolist() == [[1, 2, 0], [2, 1, 0], [0, 1, 2]]


def slow_attention(head: TriTimestepAttention, maps: Tensor) -> Tensor:
    """Compute Eq. 4 token by token and head by head, then the MLP and the block."""

    def heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: list[Tensor] = []
        for q in query:
            parts: list[Tensor] = []
            for s in (slice(0, 4), slice(4, 8)):
                weights = torch.softmax(torch.stack([q[s] @ k[s] / 4**0.5 for k in key]), dim=0)
                parts.append(sum(w * v[s] for w, v in zip(weights, value, strict=True)))
            out.append(torch.cat(parts))
        return torch.stack(out)

    features: list[Tensor] = []
    for image in maps:
        # (channels, h, w) -> one row for each position
        noisiest, middle, cleanest = (
            head.norm_in(torch.stack([level[:, y, x] for y in range(2) for x in range(3)]))
            for level in image
        )
        query = noisiest @ head.to_q.weight.T
        key = middle @ head.to_k.weight.T
        value = cleanest @ head.to_v.weight.T
        tokens = head.to_out(heads(query, key, value))
        tokens = tokens + head.mlp(head.norm_mlp(tokens))
        tokens = torch.cat([head.class_token[0], tokens])
        q, k, v = (head.block.norm_attention(tokens) @ head.block.to_qkv.weight.T).split(8, dim=1)
        tokens = tokens + head.block.to_out(heads(q, k, v))
        tokens = tokens + head.block.mlp(head.block.norm_mlp(tokens))
        features.append(head.norm_out(tokens[0]))
    return torch.stack(features)


@torch.no_grad()
def test_attention_equals_equation_4_written_out():
    torch.manual_seed(0)
    head = TriTimestepAttention(in_channels=6, width=8, num_heads=2, mlp_ratio=2)
    maps = torch.randn(2, 3, 6, 2, 3)
    torch.testing.assert_close(head(maps), slow_attention(head, maps))


def test_heads_must_divide_the_width(tiny_params: dict[str, Any]):
    with pytest.raises(ValueError, match=r"head\.width must be a multiple of head\.num_heads"):
        HeadParams.model_validate(tiny_params["head"] | {"num_heads": 3})
