"""Solvers must approach a closed-form solution, and equal diffusers' own classes."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from contradiff.base.loading import load_scheduler
from contradiff.generation.solvers import Scheduler, load_solver

STABLE_DIFFUSION = Path(__file__).resolve().parents[2] / "presets" / "stable-diffusion-v1-4"
FAST = ["dpmsolver++", "unipc"]
PLAIN: dict[str, Any] = {
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
SETTINGS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SETTINGS |= {"beta_schedule": "scaled_linear"}

MEAN, STD = 0.7, 0.3


def steps_of(scheduler: Scheduler, noise: Tensor, alphas_cumprod: Tensor) -> list[Tensor]:
    """Run a solver with the exact noise prediction for data with coordinates N(MEAN, STD^2)."""
    latents = [noise * scheduler.init_noise_sigma]
    for timestep in scheduler.timesteps:
        alpha = alphas_cumprod[int(timestep)]
        spread = (latents[-1] - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)
        noise_pred = (1 - alpha).sqrt() * spread
        latents.append(scheduler.step(noise_pred, timestep, latents[-1]).prev_sample)
    return latents


def solved(noise: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return the exact solution for the data of `steps_of`, from alpha-bar `first` to `last`."""

    def std(alpha: Tensor) -> Tensor:
        return (alpha * STD**2 + 1 - alpha).sqrt()

    return last.sqrt() * MEAN + std(last) / std(first) * (noise - first.sqrt() * MEAN)


def error_halfway(base: Path, solver: Any, num_steps: int) -> float:
    """Return the error after half of the steps; near clean latents, log SNR diverges."""
    scheduler: Any = load_solver(base, solver=solver, num_inference_steps=num_steps)
    alphas: Tensor = scheduler.alphas_cumprod
    noise = torch.randn(256, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    first, last = alphas[scheduler.timesteps[[0, num_steps // 2]]]
    reached = steps_of(scheduler, noise, alphas)[num_steps // 2]
    return (reached - solved(noise, first, last)).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmsolver++", 2), ("unipc", 2)])
def test_solvers_converge_to_the_solution_as_their_order_says(
    tiny_base: Path, solver: str, order: int
):
    """With twice the steps, a second-order solver has at most a third of the error."""
    errors = [error_halfway(tiny_base, solver, steps) for steps in (20, 40, 80)]
    assert all(fine < coarse / (1.5 * order) for coarse, fine in pairwise(errors))
    if order == 2:
        assert errors[0] < error_halfway(tiny_base, "ddim", 20) / 5


@pytest.mark.parametrize("solver", FAST)
def test_timesteps_are_as_many_as_asked_for_and_none_twice(tiny_base: Path, solver: Any):
    """Diffusers' "trailing" grid has an extra timestep -1 for 61, 103, 998 and 59 other numbers."""
    for num_steps in (1, 2, 3, 7, 20, 61, 103, 104, 333, 500, 501, 998, 999):
        scheduler: Any = load_solver(tiny_base, solver=solver, num_inference_steps=num_steps)
        timesteps = scheduler.timesteps.tolist()
        assert (len(timesteps), timesteps[0]) == (num_steps, 999)
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert timesteps[-1] > 0


@pytest.mark.parametrize("solver", FAST)
@pytest.mark.parametrize("base", ["tiny", "published"])
def test_solvers_are_diffusers_own(tiny_base: Path, solver: str, base: str):
    """The base has a DDIM file with all settings, or is Stable Diffusion with a PNDM file."""
    folder = tiny_base if base == "tiny" else STABLE_DIFFUSION
    ours = load_solver(folder, solver=solver, num_inference_steps=9)  # pyright: ignore[reportArgumentType]
    plain = PLAIN[solver](**SETTINGS)
    plain.set_timesteps(9)
    assert torch.equal(ours.timesteps, plain.timesteps)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        steps_of(ours, noise, plain.alphas_cumprod)[-1],
        steps_of(plain, noise, plain.alphas_cumprod)[-1],
    )


@pytest.mark.parametrize("solver", FAST)
def test_settings_of_the_bases_own_solver_are_not_taken_over(
    tiny_base: Path, tmp_path: Path, solver: Any
):
    shutil.copytree(tiny_base, tmp_path / "base")
    path = tmp_path / "base/scheduler/scheduler_config.json"
    foreign = {"use_karras_sigmas": True, "thresholding": True, "algorithm_type": "sde-dpmsolver++"}
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    solvers = [
        load_solver(base, solver=solver, num_inference_steps=9)
        for base in (tiny_base, tmp_path / "base")
    ]
    one, other = (steps_of(each, noise, each.alphas_cumprod)[-1] for each in solvers)
    assert torch.equal(one, other)


def test_ddim_is_the_bases_own(tiny_base: Path):
    scheduler: Any = load_solver(tiny_base, solver="ddim", num_inference_steps=20)
    assert scheduler.config == load_scheduler(tiny_base, num_inference_steps=20).config
    assert scheduler.timesteps.tolist() == list(range(951, 0, -50))
