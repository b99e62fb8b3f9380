"""The one place that decides what the two views are, and that draws what is random in a step.

stored image => `ViewChooser`, in the loader's workers => two stored views, and what conditions them
loaded batch => `draw_batch`, on the device => latents, noise, timesteps, dropped conditions
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from contradiff.base.vae import mode, sample
from contradiff.data.latents import StoredLatents
from contradiff.data.shards import image_of
from contradiff.data.streams import Pair, PairedShards
from contradiff.data.transforms import Crop, apply_crop, decode, random_crop
from contradiff.method.model import ContraDiff
from contradiff.method.noise import NUM_LEVELS, NUM_VIEWS, draw_timesteps
from contradiff.method.objective import TrainingBatch
from contradiff.training.recipe import TrainingRecipe
from contradiff.types import to_pixels

if TYPE_CHECKING:
    from accelerate import Accelerator


class ViewChooser:
    """Chooses each image's two stored views and their conditions; made for `TrainingStream`.

    Random numbers depend on the seed, the epoch and the image's key, not on who reads the image.
    """

    def __init__(
        self,
        pairs: PairedShards,
        *,
        latent_views: Literal["same", "two"],
        cond_view: Literal["same", "crop", "noise"],
        condition: Literal["pixels", "latents", "labels"],
        seed: int,
    ) -> None:
        """Decide how to choose.

        Args:
            pairs: whose latents are chosen from.
            latent_views: loss.latent_views.
            cond_view: conditioner.cond_view.
            condition: what comes beside the latents: conditioner.input, or "labels" for a class
                table. Only pixels are decoded.
            seed: of views and crops.

        Raises:
            ValueError: two views are asked for where one is stored.
        """
        info = pairs.latent_index.info
        if latent_views == "two" and info.views < 2:
            raise ValueError(
                "loss.latent_views: two needs latents.views of 2 or more; set it to same"
            )
        if condition == "latents" and cond_view == "crop" and info.views < 2:
            raise ValueError(
                "conditioner.cond_view: crop of conditioner.input latents needs latents.views of 2 "
                "or more; set it to same"
            )
        self.latent_views, self.cond_view, self.seed = latent_views, cond_view, seed
        self.condition: Literal["pixels", "latents", "labels"] = condition
        self.flips = info.flips
        self.crop_scale_min = info.crop_scale_min
        self.image_size = info.image_size

    def __call__(self, epoch: int, batch: Sequence[Pair]) -> dict[str, Tensor]:
        """Stack a batch: "moments" (2 batch 2c h w) and what conditions them.

        Moments are float16, or float32 where latents.dtype is bfloat16. The condition is
        "conditions" (2 batch 3 s s), "condition_moments" (2 batch 2c h w) or "labels" (batch).
        """
        chosen = [self._choose(epoch, pair) for pair in batch]
        moments = torch.stack([views for views, _ in chosen], dim=1)
        conditions = [condition for _, condition in chosen]
        match self.condition:
            case "pixels":  # one image, shown twice without a copy, or two
                images = torch.stack(conditions, dim=1)
                pixels = to_pixels(images.flatten(0, 1)).unflatten(0, images.shape[:2])
                return {"moments": moments, "conditions": pixels.expand(2, -1, -1, -1, -1)}
            case "latents":
                return {"moments": moments, "condition_moments": torch.stack(conditions, dim=1)}
            case "labels":
                return {"moments": moments, "labels": torch.stack(conditions)}

    def _choose(
        self, epoch: int, pair: Pair
    ) -> tuple[Float[Tensor, "2 moments h w"], Shaped[Tensor, "*shape"]]:
        """Two views of one image and what conditions them."""
        stored = StoredLatents.of_record(pair[1])
        rng = np.random.default_rng([self.seed, epoch, crc32(stored.key.encode())])
        num_stored = len(stored.crops)
        num_views = num_stored // 2 if self.flips else num_stored
        if self.latent_views == "same":
            first = second = int(rng.integers(num_views))
        else:
            first, second = 0, int(rng.integers(1, num_views))
        if self.flips:  # the mirrored views stand behind all others, in the same order
            mirrored = rng.integers(2, size=2) * num_views
            first += int(mirrored[0])
            second += int(mirrored[0 if self.latent_views == "same" else 1])
        moments = torch.from_numpy(stored.moments)
        match self.condition:
            case "pixels":
                condition = self._images(pair, stored.crops[first], rng)
            case "latents" if self.cond_view == "crop":
                condition = moments[rng.integers(num_stored, size=2)]
            case "latents":
                condition = moments[[first, first]]
            case "labels":
                condition = torch.tensor(image_of(pair[0]).label)
        return moments[[first, second]], condition

    def _images(
        self, pair: Pair, crop: Crop, rng: np.random.Generator
    ) -> UInt8[Tensor, "crops 3 s s"]:
        """Two new crops of the image, or the given one alone."""
        sample = image_of(pair[0])
        image = decode(sample.image, name=sample.key)
        crops = [crop]
        if self.cond_view == "crop":
            height, width = image.shape[1:]
            crops = [
                random_crop(rng, height, width, scale_min=self.crop_scale_min) for _ in range(2)
            ]
        return torch.stack([apply_crop(image, c, size=self.image_size) for c in crops])


def draw_batch(
    loaded: Mapping[str, Tensor],
    *,
    number: int,
    model: ContraDiff,
    recipe: TrainingRecipe,
    probabilities: Float[Tensor, " timesteps"],
    scaling_factor: float,
    accelerator: "Accelerator",
) -> TrainingBatch:
    """Add to a loaded batch all that is random in it.

    Every process draws the random numbers of the whole batch and takes its own rows, so they do not
    depend on the number of processes.

    Args:
        loaded: this process's images, as `ViewChooser` stacks them.
        number: of the batch in the training, from 0; it seeds the random numbers.
        model: knows what its conditioner takes.
        recipe: how to draw.
        probabilities: of the timesteps, on the accelerator's device.
        scaling_factor: the VAE's.
        accelerator: this process's rank and device.
    """
    device = accelerator.device
    generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + number)
    moments = loaded["moments"].to(device, non_blocking=True)
    _, num_images, channels, height, width = moments.shape
    whole = num_images * accelerator.num_processes
    start = num_images * accelerator.process_index
    mine = slice(start, start + num_images)
    latent_shape = (channels // 2, height, width)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    # The order of these draws is part of the result.
    posterior_noise = gaussian(NUM_VIEWS, whole, *latent_shape)[:, mine]
    dropped = torch.rand(NUM_VIEWS, whole, generator=generator, device=device)[:, mine]
    condition_noise = gaussian(NUM_VIEWS, whole, *model.conditioner.shape)[:, mine]
    timesteps = draw_timesteps(
        probabilities,
        batch_size=whole,
        recon_passes=recipe.loss.recon_passes,
        uniform_mix=recipe.noise.uniform_mix,
        generator=generator,
    )[:, :, mine]
    noise = gaussian(NUM_VIEWS, NUM_LEVELS, whole, *latent_shape)[:, :, mine]

    if recipe.loss.latent_views == "same":
        posterior_noise[1] = posterior_noise[0]
    dropped = dropped < recipe.conditioner.drop
    if recipe.conditioner.cond_view == "noise":
        dropped[1] = True
    # One condition that both views share is encoded once.
    cond_views = slice(1 if recipe.conditioner.cond_view == "same" else NUM_VIEWS)
    latents = sample(
        moments.flatten(0, 1),
        noise=posterior_noise.flatten(0, 1),
        scaling_factor=scaling_factor,
    )
    if recipe.conditioner.input == "pixels":
        conditions = loaded["conditions"].to(device, non_blocking=True)
    else:
        clean = loaded["condition_moments"].to(device, non_blocking=True)
        conditions = mode(clean.flatten(0, 1), scaling_factor=scaling_factor)
        conditions = conditions.unflatten(0, (NUM_VIEWS, num_images))
    return TrainingBatch(
        latents=latents.unflatten(0, (NUM_VIEWS, num_images)),
        conditions=conditions[cond_views],
        condition_noise=condition_noise[cond_views],
        dropped=dropped[cond_views],
        timesteps=timesteps,
        noise=noise,
    )
