"""The attention equals Eq. 4, computed with loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.method.attention import TriTimestepAttention, order_by_noise
from contradiff.method.params import HeadParams


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
        if head.residual == "value":
            tokens = tokens + value
        tokens = tokens + head.mlp(head.norm_mlp(tokens))
        class_token = head.class_token[0]
        if head.residual == "value":
            class_token = class_token + sum(tokens) / len(tokens)
        tokens = torch.cat([class_token, tokens])
        q, k, v = (head.block.norm_attention(tokens) @ head.block.to_qkv.weight.T).split(8, dim=1)
        tokens = tokens + head.block.to_out(heads(q, k, v))
        tokens = tokens + head.block.mlp(head.block.norm_mlp(tokens))
        features.append(head.norm_out(tokens[0]))
    return torch.stack(features)


def build_head(residual: str, init: str) -> TriTimestepAttention:
    torch.manual_seed(0)
    given: Any = {"in_channels": 6, "width": 8, "num_heads": 2, "mlp_ratio": 2}
    return TriTimestepAttention(**given, residual=residual, init=init)


@torch.no_grad()
@pytest.mark.parametrize("residual", ["none", "value"])
@pytest.mark.parametrize("init", ["random", "identity"])
def test_attention_equals_equation_4_written_out(residual: str, init: str):
    head, maps = build_head(residual, init), torch.randn(2, 3, 6, 2, 3)
    torch.testing.assert_close(head(maps), slow_attention(head, maps))


@torch.no_grad()
def test_with_residual_and_identity_start_h_is_the_normalised_mean_of_the_cleanest_map():
    head, maps = build_head("value", "identity"), torch.randn(2, 3, 6, 2, 3)
    projected = head.norm_in(maps[:, 2].flatten(2).mT) @ head.to_v.weight.T
    expected = torch.nn.functional.layer_norm(projected.mean(dim=1), (8,))
    torch.testing.assert_close(head(maps), expected)
    noisier = torch.cat([torch.randn_like(maps[:, :2]), maps[:, 2:]], dim=1)
    torch.testing.assert_close(head(noisier), expected)


@torch.no_grad()
def test_the_identity_start_of_equation_4_as_printed_still_sees_the_images():
    """Output layers of zero would make h the same for every image."""
    head, maps = build_head("none", "identity"), torch.randn(2, 3, 6, 2, 3)
    first, second = head(maps)
    assert not torch.allclose(first, second, atol=0.1)
    for mlp in (head.mlp, head.block.mlp):
        assert not mlp(torch.randn(3, 8)).any()
    for weight in (head.to_v.weight.T, head.block.to_qkv.weight[16:]):
        torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)))


@pytest.mark.parametrize("residual", ["none", "value"])
@pytest.mark.parametrize("init", ["random", "identity"])
def test_every_parameter_learns_by_the_second_step(residual: str, init: str):
    head, maps = build_head(residual, init), torch.randn(4, 3, 6, 2, 3)
    optimizer, target = torch.optim.SGD(head.parameters(), lr=0.1), torch.randn(4, 8)
    for _ in range(2):
        optimizer.zero_grad()
        (head(maps) - target).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


@torch.no_grad()
def test_the_class_token_alone_comes_out_of_the_last_block_as_it_does_with_all_tokens():
    block, tokens = build_head("value", "random").block, torch.randn(2, 5, 8)
    torch.testing.assert_close(block(tokens, num_queries=1), block(tokens)[:, :1])


def test_heads_must_divide_the_width(tiny_params: dict[str, Any]):
    with pytest.raises(ValueError, match=r"head\.width must be a multiple of head\.num_heads"):
        HeadParams.model_validate(tiny_params["head"] | {"num_heads": 3})
