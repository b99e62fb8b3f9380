"""The inversion must equal diffusers' inverse scheduler with full passes of its UNet."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler
from torch import Tensor

from contradiff.base.loading import NoiseSchedule
from contradiff.features.inversion import inverted_maps as inverted_block_maps
from contradiff.features.params import CHAIN_STEPS
from contradiff.method.model import ContraDiffModel

Build = Callable[..., ContraDiffModel]


def draw_inputs(num_images: int = 2) -> tuple[Tensor, Tensor]:
    """Draw clean latents and tokens."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(num_images, 4, 8, 8, generator=generator)
    return latents, torch.randn(num_images, 16, 16, generator=generator)


def inverted_maps(model: ContraDiffModel, *inputs: Tensor, timesteps: list[int]) -> Tensor:
    maps = inverted_block_maps(model, *inputs, timesteps=timesteps, blocks=[model.block])
    return maps[model.block]


@pytest.mark.parametrize("timesteps", [[101, 401, 201], [951, 901, 1], [151, 51, 101]])
@torch.no_grad()
def test_maps_are_diffusers_inversions(build_tiny: Build, tiny_base: Path, timesteps: list[int]):
    """`DDIMInverseScheduler.step` is given the timestep that the step reaches."""
    model, (latents, tokens) = build_tiny(), draw_inputs()
    maps = inverted_maps(model, latents, tokens, timesteps=timesteps)
    scheduler = DDIMInverseScheduler.from_pretrained(tiny_base / "scheduler")
    scheduler.set_timesteps(CHAIN_STEPS)
    grid = scheduler.timesteps.tolist()
    assert grid == list(range(1, 1000, 50))
    seen: list[Tensor] = []
    model.unet.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    for here, above in zip(grid, [*grid[1:], None], strict=True):
        noise_pred = model.unet(latents, here, encoder_hidden_states=tokens).sample
        if above is not None:
            latents = scheduler.step(noise_pred, above, latents).prev_sample
    expected = [seen[grid.index(timestep)] for timestep in sorted(timesteps, reverse=True)]
    torch.testing.assert_close(maps, torch.stack(expected, dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_chain_is_led_by_the_self_conditioned_noise(build_tiny: Build):
    model, (latents, tokens) = build_tiny(head={"self_conditioning": True}), draw_inputs()
    maps = inverted_maps(model, latents, tokens, timesteps=[101, 1, 51])
    alphas = model.schedule.alphas_cumprod
    for level, (here, above) in enumerate([(1, 51), (51, 101)]):
        steps = torch.full((2,), here)
        bottleneck = model.split_unet.down(latents, steps, tokens).bottleneck
        torch.testing.assert_close(maps[:, 2 - level], bottleneck, rtol=1e-4, atol=1e-4)
        noise_pred = model.predict(latents, steps, tokens)
        clean = (latents - (1 - alphas[here]).sqrt() * noise_pred) / alphas[here].sqrt()
        latents = alphas[above].sqrt() * clean + (1 - alphas[above]).sqrt() * noise_pred
    bottleneck = model.split_unet.down(latents, torch.full((2,), 101), tokens).bottleneck
    torch.testing.assert_close(maps[:, 0], bottleneck, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", ["mid", "up.1", "mid+up.1"])
@torch.no_grad()
def test_chain_ends_at_the_noisiest_timestep(build_tiny: Build, block: str):
    """401 is the grid's ninth timestep, and the ninth pass predicts no noise."""
    model, (latents, tokens) = build_tiny(head={"block": block}), draw_inputs()
    ran: list[str] = []
    for name in ("mid_block", "up_blocks.0", "up_blocks.2"):
        model.unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    maps = inverted_maps(model, latents, tokens, timesteps=[401, 201, 101])
    assert (ran.count("mid_block"), ran.count("up_blocks.2")) == (9, 8)
    assert ran.count("up_blocks.0") == (8 if block == "mid" else 9)  # the ninth only for the map
    assert maps.shape == (2, 3, 64 if block == "mid+up.1" else 32, 2, 2)
    assert model.attention(maps).shape == (2, 16)


@pytest.mark.parametrize(
    ("settings", "first"), [({"steps_offset": 0}, 0), ({"timestep_spacing": "trailing"}, 49)]
)
@torch.no_grad()
def test_grid_is_of_the_bases_own_settings(
    build_tiny: Build, tiny_base: Path, tmp_path: Path, settings: dict[str, Any], first: int
):
    shutil.copytree(tiny_base / "scheduler", tmp_path / "scheduler")
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    model, inputs = build_tiny(), draw_inputs()
    model.schedule = NoiseSchedule.of_base(tmp_path)
    inverted_maps(model, *inputs, timesteps=[first + 100, first, first + 50])
    with pytest.raises(AssertionError):
        inverted_maps(model, *inputs, timesteps=[401, 201, 101])
