"""contradiff.backbone: what is refused as a base, and LoRA against its formula."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from contradiff.backbone import (
    BaseParams,
    NoiseSchedule,
    add_lora,
    check_base,
    load_unet,
    load_vae,
    merge_lora,
)

CROSS_ATTENTION = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def draw_inputs() -> dict[str, Tensor]:
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


def test_a_sound_base_passes(tiny_base: Path):
    check_base(tiny_base)


@pytest.mark.parametrize(
    "missing", ["vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_a_missing_part_is_named(base: Path, missing: str):
    (base / missing).unlink()
    with pytest.raises(
        ValueError, match=rf"base\.path: .* has no {re.escape(missing)}; .*dvc pull"
    ):
        check_base(base)


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_pickled_weights_are_refused(base: Path, part: str):
    (weights,) = (base / part).glob("*.safetensors")
    weights.rename(base / part / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"base\.path: .*{part} holds no \.safetensors file"):
        check_base(base)


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "DiTTransformer2DModel"},
        {"down_block_types": ["DownBlock2D"], "mid_block_type": None, "up_block_types": []},
    ],
)
def test_another_kind_of_denoiser_is_refused(base: Path, changes: dict[str, Any]):
    edit_json(base / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=r"no UNet2DConditionModel with cross-attention"):
        check_base(base)


def test_a_unet_that_wants_more_inputs_is_refused(base: Path):
    """As SDXL's does: its added embedding would silently be left out."""
    edit_json(base / "unet" / "config.json", addition_embed_type="text_time")
    with pytest.raises(ValueError, match=r"base\.path: .* addition_embed_type 'text_time'"):
        check_base(base)


def test_another_prediction_type_is_refused(base: Path):
    edit_json(base / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"predicts v_prediction; Eq\. 3 needs epsilon"):
        check_base(base)


@pytest.mark.parametrize("load", [load_vae, load_unet])
def test_the_base_is_loaded_frozen_in_float32(tiny_base: Path, load: Any):
    module = load(tiny_base)
    assert not module.training
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in module.parameters())


def test_noise_schedule_is_the_bases_own(tiny_base: Path):
    schedule = NoiseSchedule.of_base(tiny_base)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - betas).cumprod(0).float()
    assert schedule.num_train_timesteps == 1000
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"source": "hub", "path": "a/b", "revision": None}, "must be a full commit hash"),
        ({"source": "hub", "path": "a/b", "revision": "main"}, "must be a full commit hash"),
        ({"source": "local", "path": "models/x", "revision": "a" * 40}, "has no meaning"),
    ],
)
def test_a_hub_id_needs_its_commit_and_a_folder_has_none(params: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=rf"base\.revision {message}"):
        BaseParams.model_validate(params)


@torch.no_grad()
def test_lora_starts_as_the_identity(tiny_base: Path):
    unet, inputs = load_unet(tiny_base), draw_inputs()
    before = unet(**inputs).sample
    add_lora(unet, rank=4, alpha=8.0, targets=CROSS_ATTENTION)
    assert torch.equal(unet(**inputs).sample, before)


def test_only_lora_is_trainable(tiny_base: Path):
    unet = load_unet(tiny_base)
    attentions = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    add_lora(unet, rank=4, alpha=8.0, targets=CROSS_ATTENTION)
    expected = {
        f"{attention}.{target}.lora_{factor}.default.weight"
        for attention in attentions
        for target in ("to_q", "to_k", "to_v")
        for factor in "AB"
    }
    assert len(expected) == 7 * 3 * 2
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == expected


@torch.no_grad()
def test_lora_is_alpha_over_rank_times_b_a(tiny_base: Path):
    """Against a UNet whose own weights were given the update by hand."""
    unet, by_hand, inputs = load_unet(tiny_base), load_unet(tiny_base), draw_inputs()
    before = by_hand(**inputs).sample
    add_lora(unet, rank=4, alpha=6.0, targets=CROSS_ATTENTION)
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
def test_merged_lora_is_the_same_function(tiny_base: Path):
    unet, inputs = load_unet(tiny_base), draw_inputs()
    add_lora(unet, rank=4, alpha=8.0, targets=CROSS_ATTENTION)
    randomise_lora(unet)
    unmerged = unet(**inputs).sample
    merge_lora(unet)
    torch.testing.assert_close(unet(**inputs).sample, unmerged, rtol=1e-4, atol=1e-5)
    # Folded in: the factors no longer take part.
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.zero_()
    torch.testing.assert_close(unet(**inputs).sample, unmerged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["attn3.to_q"], ["attn2.to_q", "o_q"]])
def test_a_target_that_matches_nothing_is_refused(tiny_base: Path, targets: list[str]):
    with pytest.raises(ValueError, match=rf"lora\.targets: '{targets[-1]}' matches no linear"):
        add_lora(load_unet(tiny_base), rank=4, alpha=4.0, targets=targets)


def test_parameter_counts_of_stable_diffusion():
    """Its v1.4 configuration, without memory behind it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=768,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        )
        assert sum(p.numel() for p in unet.parameters()) == 859_520_964
        add_lora(unet, rank=16, alpha=16.0, targets=CROSS_ATTENTION)
    trainable = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert trainable == 1_191_936
