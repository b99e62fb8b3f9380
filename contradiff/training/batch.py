"""How a training batch is made: the two views of each image, and all random numbers of a step.

`ViewChooser`, in the loader's workers: a stored image => two stored views, and their conditions.
`draw_batch`, on the training device: a loaded batch => latents, noise, timesteps, conditions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from contradiff.base.vae import mode, sample
from contradiff.data.latents import StoredLatents
from contradiff.data.pairs import Pair, PairedShards
from contradiff.data.shards import image_of
from contradiff.data.transforms import apply_crop, decode, random_crop
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import PerTimestep, draw_timesteps
from contradiff.method.objective import TrainingBatch
from contradiff.method.params import NUM_LEVELS, NUM_VIEWS
from contradiff.training.recipe import TrainingRecipe
from contradiff.types import to_pixels

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class ViewChooser:
    """Chooses two stored views (encoded crops) of each image and their conditions.

    Pass it to `TrainingStream` as `make_batch`. `condition` is "pixels" or "latents" to train a
    conditioner, "labels" to train a class table. Choices depend only on the seed, the epoch and the
    image's key. Raises ValueError if a setting needs two stored views, but only one is stored.
    """

    pairs: PairedShards
    _: KW_ONLY
    latent_views: Literal["same", "two"]
    cond_view: Literal["same", "crop", "noise", "noise_both"]
    condition: Literal["pixels", "latents", "labels"]
    seed: int

    def __post_init__(self) -> None:
        self.info = self.pairs.latent_index.info
        crops_latents = self.condition == "latents" and self.cond_view == "crop"
        for setting, needs_two in (
            ('loss.latent_views: "two"', self.latent_views == "two"),
            ('conditioner.cond_view: "crop", with conditioner.input "latents",', crops_latents),
        ):
            if needs_two and self.info.views < 2:
                raise ValueError(f"{setting} needs random crops; set latents.views to 2 or more")

    def __call__(self, epoch: int, batch: Sequence[Pair]) -> dict[str, Tensor]:
        """Return a batch: the latents of two views, and one kind of condition.

        "moments" (2 batch 2c h w) has the mean and log-variance of each latent. Conditions are in
        "conditions" (uint8, 2 batch 3 s s; 1 batch 3 s s if the views share an image),
        "condition_moments" (2 batch 2c h w) or "labels". No two elements share memory, or else
        a GPU's loader could not pin the batch.
        """
        chosen = [self._choose(epoch, pair) for pair in batch]
        stacked = {"moments": torch.stack([views for views, _ in chosen], dim=1)}
        conditions = [condition for _, condition in chosen]
        match self.condition:
            case "pixels":
                stacked["conditions"] = torch.stack(conditions, dim=1)
            case "latents":
                stacked["condition_moments"] = torch.stack(conditions, dim=1)
            case "labels":
                stacked["labels"] = torch.stack(conditions)
        return stacked

    def _choose(
        self, epoch: int, pair: Pair
    ) -> tuple[Float[Tensor, "2 moments h w"], Shaped[Tensor, "*shape"]]:
        """Return means and log-variances of two views of an image, and their condition."""
        stored = StoredLatents.of_record(pair[1])
        rng = np.random.default_rng([self.seed, epoch, crc32(stored.key.encode())])
        num_stored = len(stored.crops)
        num_views = num_stored // 2 if self.info.flips else num_stored
        is_same = self.latent_views == "same"
        second = int(rng.integers(0 if is_same else 1, num_views))
        first = second if is_same else 0
        if self.info.flips:  # mirrored views are stored after all others, in the same order
            mirrored = rng.integers(2, size=2) * num_views
            first += int(mirrored[0])
            second += int(mirrored[0 if is_same else 1])
        moments = torch.from_numpy(stored.moments)
        if self.condition == "labels":
            condition = torch.tensor(image_of(pair[0]).label)
        elif self.condition == "latents":
            is_cropped = self.cond_view == "crop"
            condition = moments[rng.integers(num_stored, size=2) if is_cropped else [first, first]]
        else:
            shown = image_of(pair[0])
            image, crops = decode(shown.image, name=shown.key), [stored.crops[first]]
            if self.cond_view == "crop":
                size, scale_min = image.shape[1:], self.info.crop_scale_min
                crops = [random_crop(rng, *size, scale_min=scale_min) for _ in range(2)]
            side = self.info.image_size
            condition = torch.stack([apply_crop(image, crop, size=side) for crop in crops])
        return moments[[first, second]], condition


def draw_batch(
    loaded: Mapping[str, Tensor],
    *,
    number: int,
    model: ContraDiffModel,
    recipe: TrainingRecipe,
    probabilities: PerTimestep,
    scaling_factor: float,
    accelerator: "Accelerator",
) -> TrainingBatch:
    """Add all random numbers of a training step to a batch from `ViewChooser`.

    The numbers are seeded by `recipe.seed` and the batch's `number`, counted from 0. Every process
    draws the numbers for the images of all processes and keeps its own part, so that the number of
    processes changes nothing. `probabilities` has the probability of each timestep.
    """
    device = accelerator.device
    generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + number)
    moments = loaded["moments"].to(device, non_blocking=True)
    _, num_images, channels, height, width = moments.shape
    whole, start = (num_images * n for n in (accelerator.num_processes, accelerator.process_index))
    mine, latent_shape = slice(start, start + num_images), (channels // 2, height, width)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    # Changing the order of these draws changes the results.
    cond_view = recipe.conditioner.cond_view
    cond_views = NUM_VIEWS + 1 if cond_view == "noise_both" else NUM_VIEWS
    posterior_noise = gaussian(NUM_VIEWS, whole, *latent_shape)[:, mine]
    dropped = torch.rand(cond_views, whole, generator=generator, device=device)[:, mine]
    condition_noise = gaussian(cond_views, whole, *model.conditioner.shape)[:, mine]
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
    if cond_view in ("noise", "noise_both"):
        dropped[1:] = True
    # A condition that both views share is given, and later encoded, only once.
    shown = [0] if cond_view == "same" else [0, 1, 1][:cond_views]
    posterior_noise = posterior_noise.flatten(0, 1)
    latents = sample(moments.flatten(0, 1), noise=posterior_noise, scaling_factor=scaling_factor)
    if recipe.conditioner.input == "pixels":
        images = loaded["conditions"].to(device, non_blocking=True)
        conditions = to_pixels(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        conditions = conditions.expand(NUM_VIEWS, -1, -1, -1, -1)
    else:
        clean = loaded["condition_moments"].to(device, non_blocking=True)
        conditions = mode(clean.flatten(0, 1), scaling_factor=scaling_factor)
        conditions = conditions.unflatten(0, (NUM_VIEWS, num_images))
    return TrainingBatch(
        latents=latents.unflatten(0, (NUM_VIEWS, num_images)),
        conditions=conditions[shown],
        condition_noise=condition_noise[: len(shown)],
        dropped=dropped[: len(shown)],
        timesteps=timesteps,
        noise=noise,
    )
