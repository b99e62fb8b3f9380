"""The pretrained latent diffusion model, frozen, and the LoRA that adapts its cross-attention."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.config import Section

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

M = TypeVar("M", bound=nn.Module)

PARTS = ("vae", "unet", "scheduler")
UNUSED_INPUTS = (
    *("addition_embed_type", "class_embed_type", "num_class_embeds"),
    *("encoder_hid_dim_type", "encoder_hid_dim", "center_input_sample"),
)
"""A UNet with one of these (SDXL's has) does more than noisy latents, timesteps and tokens ask."""

SHIPPED_CONFIGS = {"CompVis/stable-diffusion-v1-4": "stable-diffusion-v1-4"}
"""Hub ids whose configuration the project ships, and its folder there."""


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
    msg = (
        f"generate.num_inference_steps: {num_inference_steps} is more than the base's schedule of "
        f"{num_timesteps} timesteps has room for"
    )
    raise ValueError(msg)


def _ddim_scheduler(folder: Path) -> "DDIMScheduler":
    """Read any scheduler's file into DDIM, as diffusers' own pipelines do.

    Clipping to [-1, 1] is for pixels, never for latents, and stays off: DDIM's own default is on,
    and files of other kinds (Stable Diffusion's is PNDM's) need not name it.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


def config_folder(base: BaseParams, *, root: Path, shipped: Path) -> Path:
    """Where a base's configuration is read without weights and without a network.

    Args:
        base: which base.
        root: the project's folder, which a local base's path is relative to.
        shipped: folder of the configurations that the project ships.

    Raises:
        ValueError: there is none; names base.path.
    """
    if base.source == "local":
        folder = root / base.path
    elif base.path in SHIPPED_CONFIGS:
        folder = shipped / SHIPPED_CONFIGS[base.path]
    else:
        msg = (
            f"base.path: the configuration of {base.path} is not shipped in {shipped} (there: "
            f"{', '.join(SHIPPED_CONFIGS)}), so that nothing is known of it before it is fetched; "
            "or set base.source: local and base.path to a folder of it"
        )
        raise ValueError(msg)
    check_config(folder)
    return folder


def check_base(folder: Path) -> None:
    """Refuse a folder that is no latent diffusion model in diffusers' format.

    Raises:
        ValueError: a part is missing, or is not what ContraDiff can use; names base.path.
    """
    check_config(folder)
    for part in ("vae", "unet"):
        if not list((folder / part).glob("*.safetensors")):
            msg = (
                f"base.path: {folder / part} holds no .safetensors file; pickled weights are not "
                "read"
            )
            raise ValueError(msg)


def check_config(folder: Path) -> None:
    """As `check_base`, from the configuration files alone: there need be no weights.

    Raises:
        ValueError: a part is missing, or is not what ContraDiff can use; names base.path.
    """
    vae, unet, scheduler = (_config_of(folder, part) for part in PARTS)
    blocks = [*unet.get("down_block_types", []), *unet.get("up_block_types", [])]
    attends = any("CrossAttn" in block for block in blocks)
    if unet.get("_class_name") != "UNet2DConditionModel" or not attends:
        msg = f"base.path: {folder}/unet is no UNet2DConditionModel with cross-attention"
        raise ValueError(msg)
    # 1280 is diffusers' default
    if not isinstance(width := unet.get("cross_attention_dim", 1280), int):
        msg = (
            f"base.path: {folder}/unet has cross_attention_dim {width!r}; all its blocks must "
            "attend to tokens of one width"
        )
        raise ValueError(msg)
    for key in UNUSED_INPUTS:
        if unet.get(key):
            msg = f"base.path: {folder}/unet has {key} {unet[key]!r}, which is not supported"
            raise ValueError(msg)
    mid = "UNetMidBlock2DCrossAttn"
    if unet.get("mid_block_type", mid) != mid:
        msg = f"base.path: {folder}/unet has mid_block_type {unet['mid_block_type']!r}, not {mid}"
        raise ValueError(msg)
    # 4 is the default of both
    latent_channels, in_channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if latent_channels != in_channels:
        msg = (
            f"base.path: {folder}/unet takes {in_channels} channels (in_channels), but its vae "
            f"makes latents of {latent_channels} (latent_channels)"
        )
        raise ValueError(msg)
    if (out_channels := unet.get("out_channels", 4)) != in_channels:
        msg = (
            f"base.path: {folder}/unet takes {in_channels} channels and predicts {out_channels} "
            "(out_channels); Eq. 3 compares noise with noise"
        )
        raise ValueError(msg)
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        msg = (
            f"base.path: {folder}/scheduler predicts {scheduler['prediction_type']}; "
            "Eq. 3 needs epsilon"
        )
        raise ValueError(msg)


def check_fit(
    folder: Path,
    *,
    image_size: int,
    lora_targets: list[str],
    blocks: Mapping[str, Sequence[str]],
    timesteps: Mapping[str, Sequence[int]],
    num_inference_steps: int,
) -> None:
    """Refuse parameters that this base cannot serve, from its configuration files alone.

    Each would else be found where it is first used: after the data has been encoded, or even after
    training.

    Args:
        folder: of a base that `check_config` accepts.
        image_size: data.image_size.
        lora_targets: lora.targets.
        blocks: what is read of the UNet, by the parameter that asks for it, such as head.block.
        timesteps: at which it is read, by the parameter that asks for them.
        num_inference_steps: generate.num_inference_steps.

    Raises:
        ValueError: names the parameter.
    """
    unet = unet_without_weights(folder)
    check_lora_targets(unet, lora_targets)
    num_up_blocks = len(unet.config["up_block_types"])
    for key, asked in blocks.items():
        for block in asked:
            if "up.1" in block and num_up_blocks < 2:
                msg = (
                    f"{key}: {block} reads the UNet's second up block, but the base has "
                    f"{num_up_blocks}; ask for mid alone, or take another base"
                )
                raise ValueError(msg)
    last = NoiseSchedule.of_base(folder).num_train_timesteps - 1
    for key, steps in timesteps.items():
        if max(steps, default=0) > last:
            msg = f"{key}: {max(steps)} is beyond the base's last timestep, {last}"
            raise ValueError(msg)
    load_scheduler(folder, num_inference_steps=num_inference_steps)
    of_vae, of_unet = downsampling_of(folder), 2 ** (len(unet.config["block_out_channels"]) - 1)
    if image_size % (of_vae * of_unet):
        msg = (
            f"data.image_size: {image_size} is no multiple of {of_vae * of_unet}: this base's VAE "
            f"makes an image {of_vae} times smaller, and its UNet that {of_unet} times"
        )
        raise ValueError(msg)


def _config_of(folder: Path, part: str) -> dict[str, Any]:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / name
    if not path.is_file():
        msg = (
            f"base.path: {folder} has no {part}/{name}; expected a model folder in diffusers' "
            "format with vae/, unet/ and scheduler/. The tiny base comes by "
            "`dvc pull models/tiny`, or is retrained by `make base`"
        )
        raise ValueError(msg)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        msg = f"base.path: {path}: not valid JSON: {error}"
        raise ValueError(msg) from error


def unet_without_weights(folder: Path) -> "UNet2DConditionModel":
    """The denoiser that a folder's configuration describes, on the meta device: shapes alone."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config = _config_of(folder, "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    assert isinstance(unet, UNet2DConditionModel)
    return _frozen(unet)


def vae_without_weights(folder: Path) -> "AutoencoderKL":
    """The autoencoder that a folder's configuration describes, on the meta device."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = _config_of(folder, "vae")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    assert isinstance(vae, AutoencoderKL)
    return _frozen(vae)


def downsampling_of(folder: Path) -> int:
    """Side of an image over that of its latent, from the autoencoder's configuration."""
    vae = _config_of(folder, "vae")
    return 2 ** (len(vae["block_out_channels"]) - 1)


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

    check_lora_targets(unet, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, unet)


def check_lora_targets(unet: "UNet2DConditionModel", targets: list[str]) -> None:
    """Refuse targets that would be adapted nowhere.

    Raises:
        ValueError: a target matches no linear layer; names lora.targets.
    """
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            msg = (
                f"lora.targets: {target!r} matches no linear layer of the UNet "
                f"(such as {names[0]!r})"
            )
            raise ValueError(msg)


def merge_lora(unet: nn.Module) -> None:
    """Fold the low-rank updates into the weights, in float32: the same function, no extra cost."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=False)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def disable_lora(unet: nn.Module) -> None:
    """Leave the low-rank updates out, for good: the base's own function."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(enabled=False)  # pyright: ignore[reportUnknownMemberType]


def fetch_from_hub(name: str, revision: str, destination: Path, *, weights: bool) -> None:
    """Download the parts that are used, at one pinned commit, as safetensors alone.

    Args:
        name: hub id.
        revision: commit hash.
        destination: folder.
        weights: whether to, or the configuration alone.

    Raises:
        ValueError: it cannot be fetched; names base.path.
    """
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/*.json" for part in PARTS]
    if weights:
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
