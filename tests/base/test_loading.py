"""The loaded base is frozen, in float32, and has its own noise schedule."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler
from safetensors.torch import load_file

from contradiff.base import loading
from contradiff.base.loading import NoiseSchedule, load_scheduler

STABLE_DIFFUSION = Path(__file__).resolve().parents[2] / "presets/stable-diffusion-v1-4"


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_the_base_is_frozen_in_float32_and_its_configuration_has_its_shapes(
    tiny_base: Path, component: str
):
    loaded = getattr(loading, f"load_{component}")(tiny_base)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    built = getattr(loading, f"{component}_without_weights")(tiny_base)
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in (*loaded.parameters(), *built.parameters()))
    (weights,) = (tiny_base / component).glob("*.safetensors")
    shapes = {name: tensor.shape for name, tensor in load_file(weights).items()}
    for module in (loaded, built):
        assert {name: tensor.shape for name, tensor in module.state_dict().items()} == shapes


def test_noise_schedule_is_the_bases_own(tiny_base: Path):
    schedule = NoiseSchedule.of_base(tiny_base)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - betas).cumprod(0).float()
    assert schedule.num_train_timesteps == 1000
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-4, atol=1e-6)


def test_published_scheduler_is_read_into_ddim_with_its_own_settings(tiny_base: Path):
    """Stable Diffusion's file is for PNDM. The tiny base's is for DDIM and gives every setting."""
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
    assert torch.equal(published.alphas_cumprod, PNDMScheduler.from_config(given).alphas_cumprod)
    assert torch.equal(published.final_alpha_cumprod, published.alphas_cumprod[0])
    assert published.timesteps.tolist() == list(range(991, 0, -10))


@pytest.mark.parametrize("setting", [None, True])
def test_latents_are_never_clipped(tiny_base: Path, tmp_path: Path, setting: bool | None):
    """Early files of Stable Diffusion lack `clip_sample`, and DDIM clips by default."""
    shutil.copytree(tiny_base / "scheduler", tmp_path / "scheduler")
    path = tmp_path / "scheduler/scheduler_config.json"
    content = json.loads(path.read_text())
    del content["clip_sample"]
    path.write_text(json.dumps(content | ({} if setting is None else {"clip_sample": setting})))
    scheduler = load_scheduler(tmp_path, num_inference_steps=10)
    latents, noise_pred = torch.full((1, 4, 2, 2), 3.0), torch.zeros(1, 4, 2, 2)
    timestep = int(scheduler.timesteps[-1])
    ratio = scheduler.alphas_cumprod[0] / scheduler.alphas_cumprod[timestep]
    stepped = scheduler.step(noise_pred, timestep, latents, eta=0.0).prev_sample
    torch.testing.assert_close(stepped, latents * ratio.sqrt())
