"""Solvers of the reverse process.

The paper uses DDIM (eta = 0). The other solvers integrate the same differential equation to second
order, and so reach the same images in fewer steps.
"""

import inspect
from pathlib import Path
from typing import Any, Literal

import torch

from contradiff.base.loading import load_scheduler

Solver = Literal["ddim", "dpmsolver++", "unipc"]
Scheduler = Any
"""A scheduler of diffusers whose timesteps are set; its `step` may keep state."""


def load_solver(folder: Path, *, solver: Solver, num_inference_steps: int) -> Scheduler:
    """Load a solver with the base's noise schedule and its timesteps set.

    DDIM keeps the base's grid of timesteps, which is "leading": it starts below the last timestep.
    With few steps this gap would show, so the other solvers start from the last timestep, pure
    noise, and take equal steps (diffusers' `linspace`, which is their default). dpmsolver++ is that
    of Lu et al. (2022), multistep; unipc is that of Zhao et al. (2023); both are of second order.
    """
    ddim = load_scheduler(folder, num_inference_steps=num_inference_steps)
    if solver == "ddim":
        return ddim
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    multistep: type[Any] = (
        DPMSolverMultistepScheduler if solver == "dpmsolver++" else UniPCMultistepScheduler
    )
    # By name, so that no setting of the base is lost to another default of the other class.
    known = inspect.signature(multistep.__init__).parameters
    settings = {name: value for name, value in ddim.config.items() if name in known}
    scheduler = multistep(**settings | {"timestep_spacing": "linspace", "solver_order": 2})
    assert torch.equal(scheduler.alphas_cumprod, ddim.alphas_cumprod), "another noise schedule"
    scheduler.set_timesteps(num_inference_steps)
    return scheduler
