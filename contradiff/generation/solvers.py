"""Solvers of the reverse process.

The paper uses DDIM (eta = 0). The other solvers are second-order methods for the same differential
equation, so they reach the same images in fewer steps.
"""

from pathlib import Path
from typing import Any

from contradiff.base.config import SCHEDULE_KEYS
from contradiff.base.loading import load_scheduler
from contradiff.generation.params import Solver

Scheduler = Any
"""A diffusers scheduler whose timesteps are set. Its `step` may change the scheduler's state."""


def load_solver(folder: Path, *, solver: Solver, num_inference_steps: int) -> Scheduler:
    """Load a solver with the base's noise schedule, and set its timesteps.

    DDIM uses the base's spacing of timesteps, mostly "leading". It starts up to a step below the
    last timestep (pure noise), and `contradiff.rules` refuses numbers of steps with a larger gap.
    With few steps, this gap would be visible. So the other solvers start at the last timestep and
    take equal steps (diffusers' "linspace"). dpmsolver++ is the multistep solver of Lu et al.
    (2022). unipc is the solver of Zhao et al. (2023). Both have second order.
    """
    ddim = load_scheduler(folder, num_inference_steps=num_inference_steps)
    if solver == "ddim":
        return ddim
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    multistep: type[Any] = (
        DPMSolverMultistepScheduler if solver == "dpmsolver++" else UniPCMultistepScheduler
    )
    # Only the noise schedule and the kind of prediction are the base's. A base's file may also have
    # settings of another solver, such as Karras's noise levels, or steps that add noise.
    own = *SCHEDULE_KEYS, "prediction_type", "rescale_betas_zero_snr"
    settings = {name: ddim.config[name] for name in own}
    scheduler = multistep(**settings, timestep_spacing="linspace", solver_order=2)
    # These classes replace an alpha-bar of zero by 2 ** -24.
    difference = (scheduler.alphas_cumprod - ddim.alphas_cumprod).abs().max()
    assert difference <= 2**-24, "the schedules differ"
    scheduler.set_timesteps(num_inference_steps)
    return scheduler
