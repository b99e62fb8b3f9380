"""Which folders are refused as a base, and messages about wrong parameters."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from contradiff.base.config import (
    BETA_SCHEDULES,
    SCHEDULE_KEYS,
    SCHEDULERS,
    SHIPPED_CONFIGS,
    BaseParams,
    base_manifest,
    check_base,
    config_folder,
)
from contradiff.base.loading import NoiseSchedule


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def local(path: Path | str) -> BaseParams:
    return BaseParams(source="local", path=str(path), revision=None)


@pytest.mark.parametrize(
    "missing", ["vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_a_missing_or_broken_configuration_is_named(base: Path, missing: str):
    check_base(base)
    (base / missing).write_text("{")
    with pytest.raises(ValueError, match=rf"^base\.path: .*{missing}: damaged \("):
        check_base(base)
    (base / missing).unlink()
    expected = rf"^base\.path: .* has no {re.escape(missing)}; .*dvc pull"
    with pytest.raises(ValueError, match=expected):
        check_base(base)


def test_pickled_weights_are_refused(base: Path):
    for name in ("vae", "unet"):
        (weights,) = (base / name).glob("*.safetensors")
        weights.rename(base / name / "diffusion_pytorch_model.bin")
    expected = r"contains no diffusion_pytorch_model\.safetensors; convert its weights"
    with pytest.raises(ValueError, match=expected) as caught:
        check_base(base)
    named = [line.split()[1] for line in str(caught.value).splitlines()]
    assert named == [f"{base}/vae", f"{base}/unet"]
    check_base(base, weights=False)


NO_UNET = "unet must be a UNet2DConditionModel with cross-attention, which reads the condition"
BLOCKS = "down_block_types", "up_block_types"


@pytest.mark.parametrize(
    ("component", "changes", "fault"),
    [
        ("unet", {"_class_name": "DiTTransformer2DModel"}, f"{NO_UNET}$"),
        ("unet", {key: ["X"] for key in BLOCKS} | {"mid_block_type": "X"}, NO_UNET),
        ("unet", {key: ["X"] for key in BLOCKS}, "blocks X, which are not supported"),
        ("unet", {"cross_attention_dim": None}, r"cross_attention_dim None; .* one integer"),
        ("unet", {"cross_attention_dim": [16, 16]}, r"cross_attention_dim \[16, 16\]; "),
        # SDXL has this setting. Its added embedding would silently be left out.
        ("unet", {"addition_embed_type": "text_time"}, r"_embed_type 'text_time', .*as SDXL's"),
        ("unet", {"num_class_embeds": 1000}, "num_class_embeds 1000, .*: .* needs the class of ev"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type 'timestep', .* the class of"),
        ("unet", {"center_input_sample": True}, "center_input_sample True, which is not"),
        ("unet", {"dual_cross_attention": True}, "dual_cross_attention True, .* a text and of an"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "_dim_type 'text_proj', .* text or image"),
        ("unet", {"mid_block_type": None}, "mid_block_type null; the feature h"),
        ("unet", {"mid_block_type": "X"}, "mid_block_type 'X', not UNetMidBlock2DCrossAttn or UN"),
        ("unet", {"out_channels": 8}, "in_channels 4 and out_channels 8; it also predicts varia"),
        ("unet", {"in_channels": 9}, r"in_channels 9 and out_channels 4; .*a mask \(inpainting\)"),
        ("vae", {"latent_channels": 16}, "in_channels 4, but its vae has latent_channels 16"),
        ("scheduler", {"prediction_type": "sample"}, "'sample'; .* another scale than Eq. 3"),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type 'flow', not epsilon"),
        # what other models on the hub have
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256, which"),  # LCM
        ("unet", {"attention_type": "gated"}, "attention_type 'gated', which needs b"),  # GLIGEN
        ("unet", {"time_embedding_act_fn": "silu"}, "time_embedding_act_fn 'silu', which"),
        ("unet", {"block_out_channels": [16]}, "different numbers of down_block_types, up_block"),
        ("unet", {"norm_num_groups": None}, "norm_num_groups null"),
        ("unet", {"up_block_types": ["KCrossAttnUpBlock2D"]}, "blocks KCrossAttnUpBlock2D, which"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "class 'AutoencoderTiny'; it must be an Auto"),
        ("vae", {"shift_factor": 0.0609}, "vae has shift_factor 0.0609, which"),  # SD 3
        ("vae", {"latents_mean": [0.0] * 4}, r"vae has latents_mean \[0.0, 0.0, 0.0, 0.0\], which"),
        ("vae", {"in_channels": 4}, "vae has in_channels 4; images have 3"),
        ("scheduler", {"trained_betas": [0.1] * 9}, "9 trained_betas, but num_train_timesteps is"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr true .* predict v"),
        ("scheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True, which"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "has beta_schedule 'sigmoid', not linear"),
        *(
            ("scheduler", {"_class_name": f"{name}Scheduler"}, f"class '{name}Scheduler'; DDIM can")
            for name in ("FlowMatchEulerDiscrete", "EDMEuler", "CogVideoXDDIM", "NoSuch")
        ),
    ],
)
def test_a_base_that_the_method_cannot_use_is_refused(
    base: Path, component: str, changes: dict[str, Any], fault: str
):
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    edit_json(base / component / name, **changes)
    with pytest.raises(ValueError, match=rf"^base\.path: {base}/.*{fault}"):
        check_base(base, weights=False)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_accepted_schedulers_have_the_schedule_that_is_read_from_their_files(
    base: Path, beta_schedule: str
):
    path, spoils = base / "scheduler/scheduler_config.json", {"thresholding": True}
    for name in SCHEDULERS:
        if name == "DPMSolverSDEScheduler":  # needs torchsde
            continue
        edit_json(path, _class_name=name, beta_schedule=beta_schedule, **spoils)
        check_base(base)
        content = json.loads(path.read_text())
        own = getattr(diffusers, name)(**{key: content[key] for key in SCHEDULE_KEYS})
        schedule = NoiseSchedule.of_base(base)
        torch.testing.assert_close(schedule.alphas_cumprod, own.alphas_cumprod)
        assert not schedule.scheduler.config["thresholding"]


def test_a_file_must_state_its_schedule_because_classes_have_other_defaults(base: Path):
    path = base / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "LCMScheduler", "beta_end": 0.012}))
    with pytest.raises(ValueError, match="does not state beta_start; write") as caught:
        check_base(base)
    assert "does not state beta_schedule" in str(caught.value)


def test_configurations_are_found_without_a_network(tiny_base: Path, tmp_path: Path):
    assert config_folder(local(tiny_base.name), root=tiny_base.parent) == tiny_base
    assert config_folder(local(tiny_base), root=tmp_path) == tiny_base
    for name, folder in SHIPPED_CONFIGS.items():
        hub = BaseParams(source="hub", path=name, revision="a" * 40)
        assert config_folder(hub, root=tmp_path) == folder


def test_a_manifest_sees_every_file_of_a_local_base(base: Path):
    before = base_manifest(local(base), root=Path())
    assert base_manifest(local(base), root=Path()) == before
    assert len(before["files"]) == 5
    edit_json(base / "vae/config.json", note="changed")
    assert base_manifest(local(base), root=Path()) != before


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("hub", None, "must be a full commit hash"),
        ("hub", "main", "must be a full commit hash"),
        ("local", "a" * 40, "must be null"),
    ],
)
def test_a_hub_id_needs_its_commit_and_a_folder_has_none(
    source: str, revision: str | None, message: str
):
    with pytest.raises(ValueError, match=rf"base\.revision {message}"):
        BaseParams.model_validate({"source": source, "path": "a/b", "revision": revision})
