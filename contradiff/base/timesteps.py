"""The timesteps that DDIM takes of a base's noise schedule, from the base's configuration alone.

`rules` compares parameters with them whenever the stage `validate` runs. diffusers gives the same
numbers, but takes longer to import than all other checks together.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from contradiff.base.config import GET_AGAIN, read_config
from contradiff.files import explain_damage


@dataclass(frozen=True)
class Timesteps:
    """`total` training timesteps, and the settings by which DDIM chooses some of them."""

    total: int
    spacing: str
    offset: int

    @classmethod
    def of_base(cls, folder: Path) -> "Timesteps":
        """Read the base's scheduler file, with DDIM's defaults for missing keys."""
        config = read_config(folder, "scheduler")
        with explain_damage(folder / "scheduler/scheduler_config.json", remedy=GET_AGAIN):
            total, offset = config.get("num_train_timesteps", 1000), config.get("steps_offset", 0)
            if not isinstance(total, int) or not isinstance(offset, int) or total < 1:
                raise TypeError(f"num_train_timesteps {total!r}, steps_offset {offset!r}")
            spacing = config.get("timestep_spacing", "leading")
            if spacing not in {"leading", "trailing", "linspace"}:
                raise ValueError(f"timestep_spacing {spacing!r}")
        return cls(total, spacing, offset)

    def of_ddim(self, num_inference_steps: int) -> list[int]:
        """Return DDIM's timesteps in rising order: 1, 51, ... for 20 steps of 1000."""
        match self.spacing:
            case "leading":
                grid = np.arange(num_inference_steps) * (self.total // num_inference_steps)
                grid += self.offset
            case "linspace":
                grid = np.linspace(0, self.total - 1, num_inference_steps).round()
            case _:
                grid = np.arange(self.total, 0, -self.total / num_inference_steps)[::-1].round() - 1
        return [int(timestep) for timestep in grid]

    def are_even(self, num_inference_steps: int) -> bool:
        """Whether DDIM's steps are equal, and begin within one step of the schedule's end.

        diffusers rounds a step down: 150 steps of 1000 timesteps are steps of 6 and begin at 895,
        where the UNet takes pure noise for a noisy image.
        """
        grid, step = self.of_ddim(num_inference_steps), self.total // num_inference_steps
        is_even = all(above - below == step for below, above in pairwise(grid))
        return is_even and self.total - 1 - step <= grid[-1] < self.total
