"""Loading of the base's frozen parts: noise schedule, UNet and autoencoder (VAE)."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contradiff.base.config import GET_AGAIN, PredictionType, check_base, read_config
from contradiff.files import explain_damage
from contradiff.imports import slow_import

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule that the base was trained with (Eq. 1), and what its UNet predicts."""

    scheduler: "DDIMScheduler"

    @classmethod
    def of_base(cls, folder: Path) -> "NoiseSchedule":
        """Read the base's scheduler file as settings of DDIM, as diffusers' pipelines do.

        Clipping to [-1, 1] and thresholding are turned off, because latents must not be clipped.
        """
        with slow_import():
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        config = folder / "scheduler" / "scheduler_config.json"
        with explain_damage(config, remedy=GET_AGAIN):
            scheduler = DDIMScheduler.from_pretrained(
                folder / "scheduler", clip_sample=False, thresholding=False
            )
        assert isinstance(scheduler, DDIMScheduler)
        return cls(scheduler)

    @property
    def alphas_cumprod(self) -> Tensor:
        """Return alpha-bar of each timestep, in falling order."""
        return self.scheduler.alphas_cumprod

    @property
    def prediction_type(self) -> PredictionType:
        """Return what the base's UNet predicts, as its scheduler file says."""
        return self.scheduler.config["prediction_type"]

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of training timesteps: 1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)

    def ddim(self, num_inference_steps: int) -> "DDIMScheduler":
        """Return a DDIM scheduler with this number of steps and the base's settings."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    def ddim_timesteps(self, num_inference_steps: int) -> list[int]:
        """Return the timesteps of `ddim` in rising order: 1, 51, ... for 20 steps of 1000."""
        return sorted(self.ddim(num_inference_steps).timesteps.tolist())


def load_scheduler(folder: Path, *, num_inference_steps: int) -> "DDIMScheduler":
    """Load a DDIM scheduler with the base's noise schedule and settings, and set its steps."""
    scheduler = NoiseSchedule.of_base(folder).ddim(num_inference_steps)
    assert scheduler.timesteps.max() < len(scheduler.alphas_cumprod), "rules.py refuses more steps"
    return scheduler


def load_vae(folder: Path) -> "AutoencoderKL":
    """Load the frozen VAE in float32. The VAE of Stable Diffusion overflows in half precision."""
    return _build(folder, "vae", weights=True)


def load_unet(folder: Path) -> "UNet2DConditionModel":
    """Load the frozen UNet in float32."""
    return _build(folder, "unet", weights=True)


def vae_without_weights(folder: Path) -> "AutoencoderKL":
    """Build the autoencoder on the meta device, from its configuration: shapes without values."""
    return _build(folder, "vae", weights=False)


def unet_without_weights(folder: Path) -> "UNet2DConditionModel":
    """Build the UNet on the meta device, from its configuration: shapes without values."""
    return _build(folder, "unet", weights=False)


def _build(folder: Path, component: str, *, weights: bool) -> Any:
    kind: Any
    with slow_import():
        if component == "vae":
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

            kind = AutoencoderKL
        else:
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

            kind = UNet2DConditionModel
    place = folder / component
    with explain_damage(place / "config.json", remedy=GET_AGAIN), torch.device("meta"):
        module = kind.from_config(read_config(folder, component))
    if weights:
        check_base(folder)
        files = list(place.glob("*.safetensors"))
        with explain_damage(files[0] if len(files) == 1 else place, remedy=GET_AGAIN):
            module = kind.from_pretrained(
                folder, subfolder=component, torch_dtype=torch.float32, use_safetensors=True
            )
    if not torch.cuda.is_available():
        # CPUs compute convolutions faster in this layout; CUDA only if the blocks are compiled too
        # (docs/benchmarks.md).
        module.to(memory_format=torch.channels_last)
    return module.requires_grad_(requires_grad=False).eval()
