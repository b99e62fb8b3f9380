"""Solvers of the reverse process: one model and noise schedule, other ways through it.

DDIM (eta = 0) is the paper's. The others reach the same images in fewer steps: they integrate the
same differential equation to second order.
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
    """Load the base's own noise schedule, with the timesteps of a solver set.

    DDIM keeps the base's own grid of timesteps. The others go from the last timestep, pure noise,
    in equal steps (diffusers' `linspace`, their own default): in few steps, the gap that the base's
    "leading" grid leaves above its first timestep would show.

    Args:
        folder: of the base.
        solver: ddim | dpmsolver++ (Lu et al., 2022, second order, multistep) | unipc (Zhao et al.,
            2023, second order).
        num_inference_steps: passes of the UNet: each of these solvers takes one a step. The
            schedule has room for them: see `contradiff.rules`.
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
