"""What is refused as a base, and LoRA against its formula."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from contradiff.base.config import BaseParams, check_base, check_config, config_folder
from contradiff.base.loading import (
    NoiseSchedule,
    load_scheduler,
    load_unet,
    load_vae,
    unet_without_weights,
    vae_without_weights,
)
from contradiff.method.fit import check_fit
from contradiff.method.lora import add_lora, merge_lora

SHIPPED = Path(__file__).resolve().parents[2] / "presets"
STABLE_DIFFUSION = SHIPPED / "stable-diffusion-v1-4"
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
        {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
    ],
)
def test_another_kind_of_denoiser_is_refused(base: Path, changes: dict[str, Any]):
    edit_json(base / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=r"no UNet2DConditionModel with cross-attention"):
        check_base(base)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", "text_time"),
        ("num_class_embeds", 1000),
        ("center_input_sample", True),
        ("mid_block_type", "UNetMidBlock2D"),
    ],
)
def test_a_unet_that_does_more_is_refused(base: Path, key: str, value: object):
    """As SDXL's does: its added embedding would silently be left out."""
    edit_json(base / "unet" / "config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"base\.path: .* {key} {value!r}"):
        check_base(base)


def test_another_prediction_type_is_refused(base: Path):
    edit_json(base / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"predicts v_prediction; Eq\. 3 needs epsilon"):
        check_base(base)


def test_a_unet_and_a_vae_of_other_latents_are_refused(base: Path):
    edit_json(base / "vae" / "config.json", latent_channels=16)
    message = r"base\.path: .*unet takes 4 channels .*in_channels.*, but its vae .* latents of 16"
    with pytest.raises(ValueError, match=message):
        check_base(base)


def test_a_configuration_needs_no_weights():
    check_config(STABLE_DIFFUSION)
    with pytest.raises(ValueError, match=r"holds no \.safetensors"):
        check_base(STABLE_DIFFUSION)


@pytest.mark.parametrize(
    ("part", "build"), [("unet", unet_without_weights), ("vae", vae_without_weights)]
)
def test_the_configuration_has_the_shapes_of_the_weights(tiny_base: Path, part: str, build: Any):
    module = build(tiny_base)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in module.parameters())
    (weights,) = (tiny_base / part).glob("*.safetensors")
    shapes = {name: tensor.shape for name, tensor in load_file(weights).items()}
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == shapes


FIT: dict[str, Any] = {
    "image_size": 32,
    "lora_targets": CROSS_ATTENTION,
    "blocks": {"head.block": ["mid+up.1"]},
    "timesteps": {"features.timesteps": [401, 201, 999]},
    "num_inference_steps": 999,
}


@pytest.mark.parametrize(
    ("part", "changes", "fault"),
    [
        ("unet", {"cross_attention_dim": None}, r"cross_attention_dim None; .* one width"),
        ("unet", {"cross_attention_dim": [16, 16]}, r"cross_attention_dim \[16, 16\]; "),
        ("unet", {"out_channels": 8}, r"takes 4 channels and predicts 8 \(out_channels\)"),
    ],
)
def test_a_base_that_the_method_cannot_use_is_refused(
    base: Path, part: str, changes: dict[str, object], fault: str
):
    edit_json(base / part / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"^base\.path: .*/{part} .*{fault}"):
        check_base(base)


@pytest.mark.parametrize("name", ["vae/config.json", "scheduler/scheduler_config.json"])
def test_a_broken_configuration_is_named(base: Path, name: str):
    (base / name).write_text("{")
    with pytest.raises(ValueError, match=rf"^base\.path: .*{name}: not valid JSON"):
        check_base(base)


def test_fitting_parameters_pass(tiny_base: Path):
    check_fit(tiny_base, **FIT)
    check_fit(STABLE_DIFFUSION, **FIT | {"image_size": 256})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_targets": ["attn2.to_q", "attn3"]}, r"lora\.targets: 'attn3' matches no linear"),
        (
            {"timesteps": {"features.more_triples": [5, 1000]}},
            r"^features\.more_triples: 1000 is beyond .*999",
        ),
        ({"num_inference_steps": 1000}, r"generate\.num_inference_steps: 1000 is more than"),
        # The VAE makes 4x, the UNet 4x smaller: 8 latents a side, 2 at the bottleneck.
        ({"image_size": 30}, r"data\.image_size: 30 is no multiple of 16"),
        ({"image_size": 40}, r"data\.image_size: 40 is no multiple of 16"),
    ],
)
def test_parameters_that_do_not_fit_the_base_are_refused(
    tiny_base: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        check_fit(tiny_base, **FIT | changes)


@pytest.mark.parametrize("block", ["up.1", "mid+up.1"])
def test_a_second_up_block_must_be_there(base: Path, block: str):
    """And need not be, where it is not asked for."""
    edit_json(
        base / "unet" / "config.json",
        block_out_channels=[16],
        down_block_types=["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"],
    )
    check_fit(base, **FIT | {"blocks": {"head.block": ["mid"]}})
    with pytest.raises(ValueError, match=rf"^k: {re.escape(block)} reads .* has 1; ask for mid"):
        check_fit(base, **FIT | {"blocks": {"k": ["mid", block]}})


def test_fit_is_judged_without_weights(base: Path):
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    check_fit(base, **FIT)


def test_configurations_are_found_without_a_network(tiny_base: Path, tmp_path: Path):
    def find(source: str, path: str) -> Path:
        revision = "a" * 40 if source == "hub" else None
        base = BaseParams.model_validate({"source": source, "path": path, "revision": revision})
        return config_folder(base, root=tiny_base.parent, shipped=SHIPPED)

    assert find("local", tiny_base.name) == tiny_base
    assert find("local", str(tiny_base)) == tiny_base
    assert find("hub", "CompVis/stable-diffusion-v1-4") == STABLE_DIFFUSION
    with pytest.raises(ValueError, match=r"base\.path: the configuration of a/b is not shipped"):
        find("hub", "a/b")
    with pytest.raises(ValueError, match=r"base\.path: .* has no vae/config\.json"):
        find("local", str(tmp_path))


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


def test_published_scheduler_is_read_into_ddim_with_its_own_settings(tiny_base: Path):
    """Stable Diffusion's file is PNDM's; the tiny base's is DDIM's, with every setting spelled."""
    published = load_scheduler(STABLE_DIFFUSION, num_inference_steps=100)
    spelled = load_scheduler(tiny_base, num_inference_steps=100)
    given = json.loads((STABLE_DIFFUSION / "scheduler" / "scheduler_config.json").read_text())
    assert given["_class_name"] == "PNDMScheduler"
    of_pndm = {"_class_name", "_diffusers_version", "skip_prk_steps"}
    assert {k: v for k, v in given.items() if k not in of_pndm}.items() <= published.config.items()
    assert not published.config["clip_sample"]
    private = {key for key in published.config if key.startswith("_")} | of_pndm
    assert {k: v for k, v in published.config.items() if k not in private} == {
        k: v for k, v in spelled.config.items() if not k.startswith("_")
    }
    assert torch.equal(published.alphas_cumprod, spelled.alphas_cumprod)
    assert torch.equal(published.final_alpha_cumprod, published.alphas_cumprod[0])
    assert published.timesteps.tolist() == list(range(991, 0, -10))
    schedule = NoiseSchedule.of_base(STABLE_DIFFUSION)
    assert torch.equal(schedule.alphas_cumprod, PNDMScheduler.from_config(given).alphas_cumprod)


@pytest.mark.parametrize("setting", [None, True])
def test_latents_are_never_clipped(base: Path, setting: bool | None):
    """Early files of Stable Diffusion leave it out, and DDIM's own default is to clip."""
    path = base / "scheduler" / "scheduler_config.json"
    content = json.loads(path.read_text())
    del content["clip_sample"]
    path.write_text(json.dumps(content | ({} if setting is None else {"clip_sample": setting})))
    scheduler = load_scheduler(base, num_inference_steps=10)
    latents, noise_pred = torch.full((1, 4, 2, 2), 3.0), torch.zeros(1, 4, 2, 2)
    timestep = int(scheduler.timesteps[-1])
    ratio = scheduler.alphas_cumprod[0] / scheduler.alphas_cumprod[timestep]
    stepped = scheduler.step(noise_pred, timestep, latents, eta=0.0).prev_sample
    torch.testing.assert_close(stepped, latents * ratio.sqrt())


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
    unet = unet_without_weights(STABLE_DIFFUSION)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    with torch.device("meta"):
        add_lora(unet, rank=16, alpha=16.0, targets=CROSS_ATTENTION)
    trainable = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert trainable == 1_191_936
