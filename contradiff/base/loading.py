"""The pretrained latent diffusion model, frozen: its noise schedule, UNet and autoencoder."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contradiff.base.config import check_base, read_config

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler


@dataclass(frozen=True)
class NoiseSchedule:
    """The base's own forward process (Eq. 1): alpha-bar at each timestep of training."""

    scheduler: "DDIMScheduler"

    @classmethod
    def of_base(cls, folder: Path) -> "NoiseSchedule":
        """Read any scheduler's file as DDIM's, as diffusers' own pipelines do.

        DDIM clips to [-1, 1] unless its file says otherwise, and files of other schedulers (Stable
        Diffusion's is PNDM's) say nothing. Latents must not be clipped, so clipping is turned off.
        """
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
        assert isinstance(scheduler, DDIMScheduler)
        return cls(scheduler)

    @property
    def alphas_cumprod(self) -> Tensor:
        """Falling, one number for each timestep."""
        return self.scheduler.alphas_cumprod

    @property
    def num_train_timesteps(self) -> int:
        """1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)

    def ddim(self, num_inference_steps: int) -> "DDIMScheduler":
        """Return DDIM with its steps set and the base's settings (steps_offset, ...)."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    def ddim_timesteps(self, num_inference_steps: int) -> list[int]:
        """Return the timesteps of that DDIM, rising: 1, 51, ... for 20 steps of 1000."""
        return sorted(self.ddim(num_inference_steps).timesteps.tolist())


def load_scheduler(folder: Path, *, num_inference_steps: int) -> "DDIMScheduler":
    """Load DDIM with the base's own schedule and settings, and set its steps."""
    scheduler = NoiseSchedule.of_base(folder).ddim(num_inference_steps)
    assert scheduler.timesteps.max() < len(scheduler.alphas_cumprod), "rules.py refuses more steps"
    return scheduler


def load_vae(folder: Path) -> "AutoencoderKL":
    """Load the frozen autoencoder in float32 (half precision overflows for Stable Diffusion)."""
    return _build(folder, "vae", weights=True)


def load_unet(folder: Path) -> "UNet2DConditionModel":
    """Load the frozen UNet in float32."""
    return _build(folder, "unet", weights=True)


def vae_without_weights(folder: Path) -> "AutoencoderKL":
    """Build the autoencoder from its configuration, on the meta device: it has only shapes."""
    return _build(folder, "vae", weights=False)


def unet_without_weights(folder: Path) -> "UNet2DConditionModel":
    """Build the UNet from its configuration, on the meta device: it has only shapes."""
    return _build(folder, "unet", weights=False)


def _build(folder: Path, component: str, *, weights: bool) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    kind: Any = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}[component]
    if weights:
        check_base(folder)
        module = kind.from_pretrained(
            folder, subfolder=component, torch_dtype=torch.float32, use_safetensors=True
        )
    else:
        with torch.device("meta"):
            module = kind.from_config(read_config(folder, component))
    return module.requires_grad_(requires_grad=False).eval()
