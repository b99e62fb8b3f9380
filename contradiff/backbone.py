"""The pretrained latent diffusion model, frozen, and the LoRA that adapts its cross-attention."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.config import Section

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

M = TypeVar("M", bound=nn.Module)

PARTS = ("vae", "unet", "scheduler")
UNUSED_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")
"""A UNet with one of these (SDXL's has) wants more than noisy latents, timesteps and tokens."""


class BaseParams(Section):
    """Section `base`: which pretrained model everything starts from."""

    source: Literal["local", "hub"] = Field(
        description="a folder in diffusers' format, or a hub id"
    )
    path: str = Field(min_length=1, description="the folder, or the hub id")
    revision: str | None = Field(description="hub: a commit hash, which pins the weights")

    @model_validator(mode="after")
    def _revision_belongs_to_hub(self) -> "BaseParams":
        if self.source == "hub" and (self.revision is None or len(self.revision) != 40):
            msg = "base.revision must be a full commit hash (40 digits) when base.source is hub"
            raise ValueError(msg)
        if self.source == "local" and self.revision is not None:
            msg = "base.revision has no meaning when base.source is local; set it to null"
            raise ValueError(msg)
        return self


class LoraParams(Section):
    """Section `lora` (paper: rank 16 in the cross-attention's q, k, v)."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0, description="the update is scaled by alpha / rank")
    targets: list[str] = Field(min_length=1, description="suffixes of the UNet's linear layers")


@dataclass(frozen=True)
class NoiseSchedule:
    """The base's own forward process (Eq. 1): alpha-bar on its grid of training timesteps."""

    alphas_cumprod: Tensor

    @classmethod
    def of_base(cls, folder: Path) -> "NoiseSchedule":
        """Read the schedule of a model folder's `scheduler/`."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        assert isinstance(scheduler, DDIMScheduler)
        return cls(scheduler.alphas_cumprod)

    @property
    def num_train_timesteps(self) -> int:
        """Length of the grid: 1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)


def check_base(folder: Path) -> None:
    """Refuse a folder that is no latent diffusion model in diffusers' format.

    Raises:
        ValueError: a part is missing, or is not what ContraDiff can use; names base.path.
    """
    for part in PARTS:
        config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if not config.is_file():
            msg = (
                f"base.path: {folder} has no {config.relative_to(folder)}; expected a model folder "
                "in diffusers' format with vae/, unet/ and scheduler/. The tiny base comes by "
                "`dvc pull models/tiny`, or is retrained by `make base`"
            )
            raise ValueError(msg)
    for part in ("vae", "unet"):
        if not list((folder / part).glob("*.safetensors")):
            msg = (
                f"base.path: {folder / part} holds no .safetensors file; pickled weights are not "
                "read"
            )
            raise ValueError(msg)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    if unet.get("_class_name") != "UNet2DConditionModel" or "CrossAttn" not in str(unet):
        msg = f"base.path: {folder}/unet is no UNet2DConditionModel with cross-attention"
        raise ValueError(msg)
    for key in UNUSED_INPUTS:
        if unet.get(key) is not None:
            msg = f"base.path: {folder}/unet has {key} {unet[key]!r}, which is not supported"
            raise ValueError(msg)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        msg = (
            f"base.path: {folder}/scheduler predicts {scheduler['prediction_type']}; "
            "Eq. 3 needs epsilon"
        )
        raise ValueError(msg)


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


def add_lora(unet: "UNet2DConditionModel", *, rank: int, alpha: float, targets: list[str]) -> None:
    """Insert trainable low-rank updates in place; they start as the identity (B = 0).

    Raises:
        ValueError: a target matches no layer; names lora.targets.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            msg = (
                f"lora.targets: {target!r} matches no linear layer of the UNet "
                f"(such as {names[0]!r})"
            )
            raise ValueError(msg)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, unet)


def merge_lora(unet: nn.Module) -> None:
    """Fold the low-rank updates into the weights, in float32: the same function, no extra cost."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=False)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def fetch_from_hub(name: str, revision: str, destination: Path) -> None:
    """Download the parts that are used, at one pinned commit, as safetensors alone."""
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/*.json" for part in PARTS]
    patterns += [f"{part}/diffusion_pytorch_model.safetensors" for part in PARTS[:2]]
    try:
        snapshot_download(name, revision=revision, allow_patterns=patterns, local_dir=destination)
    except Exception as error:
        msg = (
            f"base.path: {name} at {revision} could not be fetched from the hub ({error}); without "
            "a network, download it elsewhere, set base.source: local and base.path to its folder"
        )
        raise ValueError(msg) from error


def _frozen(module: M) -> M:
    return module.requires_grad_(requires_grad=False).eval()
