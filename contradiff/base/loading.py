"""The pretrained latent diffusion model, frozen: its noise schedule, UNet and autoencoder."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from contradiff.base.config import check_base, read_part

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class NoiseSchedule:
    """The base's own forward process (Eq. 1): alpha-bar on its grid of training timesteps."""

    scheduler: "DDIMScheduler"

    @classmethod
    def of_base(cls, folder: Path) -> "NoiseSchedule":
        """Read the schedule of a model folder's `scheduler/`."""
        return cls(_ddim_scheduler(folder))

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha-bar of each timestep, falling."""
        return self.scheduler.alphas_cumprod

    def ddim_timesteps(self, num_steps: int) -> list[int]:
        """The base's own grid of a DDIM chain, rising: 1, 51, ... for 20 steps of SD's 1000."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(num_steps)
        return sorted(scheduler.timesteps.tolist())

    @property
    def num_train_timesteps(self) -> int:
        """Length of the grid: 1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)


def load_scheduler(folder: Path, *, num_inference_steps: int) -> "DDIMScheduler":
    """DDIM on the base's own schedule and settings (steps_offset, set_alpha_to_one).

    Raises:
        ValueError: more steps than the schedule has; names generate.num_inference_steps.
    """
    scheduler = _ddim_scheduler(folder)
    num_timesteps: int = scheduler.config["num_train_timesteps"]
    if num_inference_steps <= num_timesteps:
        scheduler.set_timesteps(num_inference_steps)
        # With all of Stable Diffusion's 1000 steps, steps_offset pushes the first beyond the grid.
        if int(scheduler.timesteps.max()) < num_timesteps:
            return scheduler
    raise ValueError(
        f"generate.num_inference_steps: {num_inference_steps} is more than the base's schedule of "
        f"{num_timesteps} timesteps has room for"
    )


def _ddim_scheduler(folder: Path) -> "DDIMScheduler":
    """Read any scheduler's file into DDIM, as diffusers' own pipelines do.

    Clipping to [-1, 1] is for pixels, never for latents, and stays off: DDIM's own default is on,
    and files of other kinds (Stable Diffusion's is PNDM's) need not name it.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


def unet_without_weights(folder: Path) -> "UNet2DConditionModel":
    """The denoiser that a folder's configuration describes, on the meta device: shapes alone."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config = read_part(folder, "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    assert isinstance(unet, UNet2DConditionModel)
    return _frozen(unet)


def vae_without_weights(folder: Path) -> "AutoencoderKL":
    """The autoencoder that a folder's configuration describes, on the meta device."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = read_part(folder, "vae")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    assert isinstance(vae, AutoencoderKL)
    return _frozen(vae)


def load_vae(folder: Path) -> "AutoencoderKL":
    """Load the frozen autoencoder in float32 (its half-precision overflows on Stable Diffusion)."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    check_base(folder)
    vae = AutoencoderKL.from_pretrained(
        folder, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True
    )
    return _frozen(vae)


def load_unet(folder: Path) -> "UNet2DConditionModel":
    """Load the frozen denoiser in float32."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    check_base(folder)
    unet = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", torch_dtype=torch.float32, use_safetensors=True
    )
    return _frozen(unet)


def _frozen(module: M) -> M:
    return module.requires_grad_(requires_grad=False).eval()
