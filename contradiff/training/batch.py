"""All that is random in a step of pretraining, drawn alike for any number of processes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contradiff.base.vae import mode, sample
from contradiff.data.streams import PairedShards
from contradiff.method.model import ContraDiff
from contradiff.method.noise import NUM_LEVELS, NUM_VIEWS, draw_timesteps, timestep_probabilities
from contradiff.method.objective import TrainingBatch
from contradiff.training.recipe import TrainingRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


class BatchDrawer:
    """Adds to the loader's views all that is random in a step."""

    def __init__(
        self,
        model: ContraDiff,
        pairs: PairedShards,
        recipe: TrainingRecipe,
        accelerator: "Accelerator",
    ) -> None:
        self.recipe, self.device = recipe, accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.shape = model.conditioner.shape
        self.scaling_factor = pairs.latent_index.info.scaling_factor
        self.probabilities = timestep_probabilities(
            model.schedule.alphas_cumprod, schedule=recipe.noise.schedule
        ).to(self.device)

    def __call__(self, loaded: Mapping[str, Tensor], number: int) -> TrainingBatch:
        """This process's rows of batch (part of a step) `number`.

        Every process draws the whole batch's random numbers and takes its rows: they do not
        depend on the number of processes.
        """
        generator = torch.Generator(self.device)
        generator.manual_seed(self.recipe.seed * 1_000_003 + number)
        moments = loaded["moments"].to(self.device, non_blocking=True)
        _, num_images, channels, height, width = moments.shape
        whole = num_images * self.world_size
        mine = slice(self.rank * num_images, (self.rank + 1) * num_images)
        latent_shape = (channels // 2, height, width)

        def gaussian(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        posterior_noise = gaussian(NUM_VIEWS, whole, *latent_shape)[:, mine]
        if self.recipe.loss.latent_views == "same":
            posterior_noise[1] = posterior_noise[0]
        latents = sample(
            moments.flatten(0, 1),
            noise=posterior_noise.flatten(0, 1),
            scaling_factor=self.scaling_factor,
        )
        dropped = torch.rand(NUM_VIEWS, whole, generator=generator, device=self.device)[:, mine]
        dropped = dropped < self.recipe.conditioner.drop
        if self.recipe.conditioner.cond_view == "noise":
            dropped[1] = True
        return TrainingBatch(
            latents=latents.unflatten(0, (NUM_VIEWS, num_images)),
            conditions=self._conditions(loaded),
            condition_noise=gaussian(NUM_VIEWS, whole, *self.shape)[:, mine],
            dropped=dropped,
            timesteps=draw_timesteps(
                self.probabilities,
                batch_size=whole,
                recon_passes=self.recipe.loss.recon_passes,
                uniform_mix=self.recipe.noise.uniform_mix,
                generator=generator,
            )[:, :, mine],
            noise=gaussian(NUM_VIEWS, NUM_LEVELS, whole, *latent_shape)[:, :, mine],
        )

    def _conditions(self, loaded: Mapping[str, Tensor]) -> Tensor:
        """Clean images as the conditioner takes them; latents without the posterior's noise."""
        if self.recipe.conditioner.input == "pixels":
            return loaded["conditions"].to(self.device, non_blocking=True)
        moments = loaded["condition_moments"].to(self.device, non_blocking=True)
        clean = mode(moments.flatten(0, 1), scaling_factor=self.scaling_factor)
        return clean.unflatten(0, moments.shape[:2])
