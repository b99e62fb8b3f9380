"""Generation: Gaussian noise -> DDIM steps -> latents -> images (Tables 4 and 5, Appendix A)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from contradiff.config import Section
from contradiff.latents import decode_latents, downsampling_factor
from contradiff.model import ContraDiff
from contradiff.types import ByteImages, Latents, Tokens

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler


class GenerateParams(Section):
    """Section `generate`. Paper: 50,000 images, 100 steps.

    Unconditional samples, which have nothing to guide: their condition is the null condition.
    """

    num_samples: int = Field(ge=1)
    num_inference_steps: int = Field(ge=1, description="DDIM steps, eta = 0")
    batch_size: int = Field(ge=1)


def load_scheduler(base: Path, *, num_inference_steps: int) -> "DDIMScheduler":
    """DDIM on the base's own schedule and settings (steps_offset, set_alpha_to_one, no clipping).

    Raises:
        ValueError: more steps than the schedule has.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(base / "scheduler")
    assert isinstance(scheduler, DDIMScheduler)
    num_timesteps: int = scheduler.config["num_train_timesteps"]
    if num_inference_steps <= num_timesteps:
        scheduler.set_timesteps(num_inference_steps)
        # With all of Stable Diffusion's 1000 steps, steps_offset pushes the first beyond the grid.
        if int(scheduler.timesteps.max()) < num_timesteps:
            return scheduler
    msg = (
        f"generate.num_inference_steps: {num_inference_steps} is more than the base's schedule of "
        f"{num_timesteps} timesteps has room for"
    )
    raise ValueError(msg)


def seeded_noise(
    shape: tuple[int, ...], *, seed: int, index: int, stream: str
) -> Float[Tensor, "..."]:
    """Gaussian noise of one sample: the same at any batch size, device and process count.

    Args:
        shape: of the noise.
        seed: of the run.
        index: of the sample.
        stream: "latent" or "condition": independent noises of one sample.
    """
    offset = {"latent": 0, "condition": 1}[stream]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 2 + offset)
    return torch.randn(shape, generator=generator)


@torch.inference_mode()
def denoise(
    model: ContraDiff, scheduler: "DDIMScheduler", latents: Latents, tokens: Tokens
) -> Latents:
    """Run the reverse process from pure noise, deterministically (eta = 0).

    Args:
        model: evaluation mode.
        scheduler: with its timesteps set.
        latents: Gaussian noise.
        tokens: conditions.
    """
    for timestep in scheduler.timesteps:
        steps = torch.full((len(latents),), int(timestep), device=latents.device)
        noise_pred = model.noise_pred(latents, steps, tokens)
        latents = scheduler.step(noise_pred, int(timestep), latents, eta=0.0).prev_sample  # pyright: ignore[reportAttributeAccessIssue]
    return latents


def generate_unconditional(
    model: ContraDiff,
    vae: "AutoencoderKL",
    scheduler: "DDIMScheduler",
    *,
    params: GenerateParams,
    image_size: int,
    seed: int,
    device: torch.device,
    on_progress: Callable[[int], None],
) -> Iterator[ByteImages]:
    """Yield batches of images, in the order of their sample indices.

    Unconditional means a condition of Gaussian pixels (App. A), c(noise): the null condition
    itself, so that there is nothing to guide.

    Args:
        model: evaluation mode, LoRA merged or not, on `device`.
        vae: on `device`.
        scheduler: DDIM with its timesteps set.
        params: counts and steps.
        image_size: side of the conditioner's pixels.
        seed: sample i has noise of (seed, i).
        device: where to compute.
        on_progress: told the number of images of each batch.
    """
    # Not the UNet's own sample_size: Stable Diffusion's is 64, for 512 pixels.
    side = image_size // downsampling_factor(vae)
    shape = (model.unet.config["in_channels"], side, side)
    for start in range(0, params.num_samples, params.batch_size):
        indices = range(start, min(start + params.batch_size, params.num_samples))
        latents = torch.stack(
            [seeded_noise(shape, seed=seed, index=i, stream="latent") for i in indices]
        )
        pixels = torch.stack(
            [
                seeded_noise((3, image_size, image_size), seed=seed, index=i, stream="condition")
                for i in indices
            ]
        )
        with torch.inference_mode():
            tokens = model.encode_condition(pixels.to(device))
        start_noise = latents.to(device) * scheduler.init_noise_sigma
        clean = denoise(model, scheduler, start_noise, tokens)
        yield decode_latents(vae, clean).cpu()
        on_progress(len(indices))
