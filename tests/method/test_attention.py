"""Against diffusers' own pass, and against Eq. 4 written out."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from contradiff.method.attention import HeadParams, Projector, TriTimestepAttention, order_by_noise
from contradiff.method.unet import (
    MapBlock,
    block_channels,
    block_maps,
    decode_from_bottleneck,
    encode_to_bottleneck,
)
from tests.settings import features_params


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Like Stable Diffusion's: the last down block and the first up block have no attention.

    Unlike it, the second up block has fewer channels than the mid block: none is taken for another.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 24, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return unet.eval()


def draw_inputs(height: int, width: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, 4, height, width, generator=generator)
    tokens = torch.randn(3, 5, 8, generator=generator)
    return latents, torch.tensor([0, 401, 999]), tokens


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (12, 5)])
@torch.no_grad()
def test_encode_then_decode_is_the_unets_own_pass(
    unet: UNet2DConditionModel, height: int, width: int
):
    """Bit for bit, at sizes too that the down blocks do not divide."""
    latents, timesteps, tokens = draw_inputs(height, width)
    encoded = encode_to_bottleneck(unet, latents, timesteps, tokens)
    ours = decode_from_bottleneck(unet, encoded, tokens)
    assert torch.equal(ours, unet(latents, timesteps, encoder_hidden_states=tokens).sample)


@torch.no_grad()
def test_bottleneck_is_the_mid_blocks_output(unet: UNet2DConditionModel):
    latents, timesteps, tokens = draw_inputs(8, 8)
    seen: list[Tensor] = []
    hook = unet.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    unet(latents, timesteps, encoder_hidden_states=tokens)
    hook.remove()
    encoded = encode_to_bottleneck(unet, latents, timesteps, tokens)
    assert encoded.bottleneck.shape == (3, 32, 2, 2)
    assert torch.equal(encoded.bottleneck, seen[0])


@torch.no_grad()
def test_rows_of_the_state_decode_alone(unet: UNet2DConditionModel):
    latents, timesteps, tokens = draw_inputs(8, 8)
    encoded = encode_to_bottleneck(unet, latents, timesteps, tokens)
    whole = decode_from_bottleneck(unet, encoded, tokens)
    part = decode_from_bottleneck(unet, encoded[1:], tokens[1:])
    torch.testing.assert_close(part, whole[1:])


def test_encoding_does_not_run_the_up_blocks(unet: UNet2DConditionModel):
    def fail(*_: object) -> None:
        raise AssertionError

    hooks = [block.register_forward_hook(fail) for block in (*unet.up_blocks, unet.conv_out)]
    with torch.no_grad():
        encode_to_bottleneck(unet, *draw_inputs(8, 8))
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("block", ["mid", "up.1", "mid+up.1"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (12, 5)])
@torch.no_grad()
def test_block_maps_are_those_of_the_unets_own_pass(
    unet: UNet2DConditionModel, height: int, width: int, block: MapBlock
):
    """Bit for bit, and without the up blocks behind them."""
    latents, timesteps, tokens = draw_inputs(height, width)
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *args: seen.append(args[2]))
        for module in (unet.mid_block, unet.up_blocks[1])
    ]
    unet(latents, timesteps, encoder_hidden_states=tokens)
    for hook in hooks:
        hook.remove()
    mid, up = seen
    pooled = F.adaptive_avg_pool2d(up, mid.shape[2:])
    assert up.shape[1:] == (24, height, width)
    expected = {"mid": mid, "up.1": pooled, "mid+up.1": torch.cat([mid, pooled], dim=1)}[block]

    ran: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, module in enumerate((*unet.up_blocks, unet.conv_out))
    ]
    encoded = encode_to_bottleneck(unet, latents, timesteps, tokens)
    maps = block_maps(unet, encoded, tokens, block=block)
    for hook in hooks:
        hook.remove()
    assert torch.equal(maps, expected)
    assert maps.shape[1] == block_channels(unet, block)
    assert ran == ([] if block == "mid" else [0, 1])


def test_up_1_is_averaged_over_the_cells_of_the_bottlenecks_grid(unet: UNet2DConditionModel):
    with torch.no_grad():
        latents, timesteps, tokens = draw_inputs(8, 8)
        seen: list[Tensor] = []
        hook = unet.up_blocks[1].register_forward_hook(lambda *args: seen.append(args[2]))
        encoded = encode_to_bottleneck(unet, latents, timesteps, tokens)
        maps = block_maps(unet, encoded, tokens, block="up.1")
        hook.remove()
    assert maps.shape == (3, 24, 2, 2)
    torch.testing.assert_close(maps[:, :, 1, 0], seen[0][:, :, 4:, :4].mean(dim=(2, 3)))


def test_a_unet_of_one_up_block_has_no_up_1():
    unet = UNet2DConditionModel(
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    assert block_channels(unet, "mid") == 16
    for block in ("up.1", "mid+up.1"):
        with pytest.raises(ValueError, match=r"^head\.block: .* second up block, .* has 1"):
            block_channels(unet, block)


@torch.no_grad()
def test_maps_of_stable_diffusion_cost_less_than_half_a_pass():
    """SD v1.4's UNet at 256 pixels: the up blocks, which features do without, are 68% of a pass."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=768,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        )
        latents, timesteps = torch.empty(1, 4, 32, 32), torch.zeros(1, dtype=torch.long)
        tokens = torch.empty(1, 256, 768)
    with FlopCounterMode(display=False) as whole:
        unet(latents, timesteps, encoder_hidden_states=tokens)
    with FlopCounterMode(display=False) as stopped:
        encoded = encode_to_bottleneck(unet, latents, timesteps, tokens)
        maps = block_maps(unet, encoded, tokens, block="mid")
    assert maps.shape == (1, 1280, 4, 4)
    assert {block: block_channels(unet, block) for block in ("mid", "up.1", "mid+up.1")} == {
        "mid": 1280,
        "up.1": 1280,
        "mid+up.1": 2560,
    }
    assert stopped.get_total_flops() < 0.5 * whole.get_total_flops()
    assert 1 - stopped.get_total_flops() / whole.get_total_flops() == pytest.approx(0.68, abs=0.01)


def test_order_by_noise_sorts_each_image_from_noisiest_to_cleanest():
    timesteps = torch.tensor([[101, 7, 5], [401, 8, 5], [201, 900, 3]])
    # A map holds its own timestep, and beside it which draw it was.
    draws = torch.arange(3).view(3, 1).expand(3, 3)
    maps = torch.stack([timesteps, draws], dim=2).float().view(3, 3, 2, 1, 1).repeat(1, 1, 1, 2, 2)
    ordered = order_by_noise(maps, timesteps)
    assert ordered.shape == (3, 3, 2, 2, 2)
    assert ordered[:, :, 0, 0, 0].tolist() == [[401, 201, 101], [900, 8, 7], [5, 5, 3]]
    # Equal timesteps keep the order in which they were drawn.
    assert ordered[:, :, 1, 1, 1].tolist() == [[1, 2, 0], [2, 1, 0], [0, 1, 2]]


def build_attention(*, seed: int = 0) -> TriTimestepAttention:
    torch.manual_seed(seed)
    return TriTimestepAttention(in_channels=6, width=8, num_heads=2, mlp_ratio=2)


def draw_maps(*, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 6, 2, 3, generator=torch.Generator().manual_seed(seed))


def slow_attention(head: TriTimestepAttention, maps: Tensor) -> Tensor:
    """Eq. 4 a token and a head at a time, then the MLP and the class token's block."""

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
        # (channels, h, w) -> one row a position.
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
    head, maps = build_attention(), draw_maps()
    torch.testing.assert_close(head(maps), slow_attention(head, maps))


@pytest.mark.parametrize(("level", "weight"), [(0, "to_q"), (1, "to_k"), (2, "to_v")])
def test_noisiest_feeds_the_query_middle_the_key_cleanest_the_value(level: int, weight: str):
    """With its projection at zero, a level no longer reaches h."""
    head, maps = build_attention(), draw_maps().requires_grad_()
    with torch.no_grad():
        getattr(head, weight).weight.zero_()
    (gradient,) = torch.autograd.grad(head(maps)[:, 0].sum(), maps)
    assert not gradient[:, level].any()
    # Query or key at zero: attention is equal everywhere, so that only the values are left.
    assert gradient[:, 2].any() == (weight != "to_v")


@torch.no_grad()
def test_changing_the_cleanest_map_changes_values_alone():
    head, maps = build_attention(), draw_maps()
    seen: dict[str, list[Tensor]] = {"to_q": [], "to_k": [], "to_v": []}
    for name, outputs in seen.items():
        getattr(head, name).register_forward_hook(lambda *args, to=outputs: to.append(args[2]))
    changed = maps.clone()
    changed[:, 2] += torch.randn(2, 6, 2, 3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(head(maps), head(changed))
    assert torch.equal(*seen["to_q"])
    assert torch.equal(*seen["to_k"])
    assert not torch.equal(*seen["to_v"])


@torch.no_grad()
def test_h_does_not_depend_on_where_the_query_positions_stand():
    """No positions are added: moving all three maps alike leaves h as it is."""
    head, maps = build_attention(), draw_maps()
    torch.testing.assert_close(head(maps.flip(-1)), head(maps))


def test_parameter_counts_at_the_papers_scale():
    with torch.device("meta"):
        attention = TriTimestepAttention(in_channels=1280, width=1024, num_heads=8, mlp_ratio=4)
        projector = Projector(in_width=1024, width=1024, out_width=128)
    assert sum(p.numel() for p in attention.parameters()) == 25_976_320
    assert sum(p.numel() for p in projector.parameters()) == 1_181_696


HEAD = {
    "block": "mid",
    "self_conditioning": False,
    "width": 16,
    "num_heads": 2,
    "mlp_ratio": 4,
    "projector_width": 8,
    "projector_out": 4,
}


def test_heads_must_divide_the_width():
    HeadParams.model_validate(HEAD)
    with pytest.raises(ValueError, match=r"head\.width must be a multiple of head\.num_heads"):
        HeadParams.model_validate(HEAD | {"num_heads": 3})


@pytest.mark.parametrize("timesteps", [[401, 401, 101], [401, 201, -1], [401, 201]])
def test_the_evaluation_triple_is_three_distinct_timesteps(timesteps: list[int]):
    with pytest.raises(ValueError, match="timesteps"):
        features_params(timesteps=timesteps)
