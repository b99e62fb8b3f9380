"""FLOPs of a training step and of one image's features, for each switch of the method.

    python -m bench flops                 the paper preset: Stable Diffusion v1.4 at 256 pixels
    python -m bench flops presets/tiny.yaml

Counted by torch's FlopCounterMode while a step runs forward and backward on the meta device:
exact, the same on every machine, seconds. Matrix products, convolutions and attention count.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from contradiff.backbone import (
    BaseParams,
    LoraParams,
    NoiseSchedule,
    config_folder,
    downsampling_of,
    unet_without_weights,
)
from contradiff.conditioner import ConditionerParams
from contradiff.config import Section, parse, read_params
from contradiff.features import FeaturesParams, HeadParams
from contradiff.inversion import inverted_maps
from contradiff.losses import LossParams
from contradiff.model import ContraDiff, TrainingBatch
from contradiff.training import PretrainParams

NUM_IMAGES = 4
"""FLOPs an image do not depend on it, but for the contrastive loss's own few."""

VARIANTS: dict[str, dict[str, Any]] = {
    "the preset": {},
    "loss.lambda=0": {"loss.lambda": 0.0},
    "loss.recon_passes=6": {"loss.recon_passes": 6},
    "loss.min_snr_gamma=5": {"loss.min_snr_gamma": 5.0},
    "conditioner.cond_view=crop": {"conditioner.cond_view": "crop"},
    "conditioner.input=latents (patch 2)": {
        "conditioner.input": "latents",
        "conditioner.patch_size": 2,
    },
    "head.block=mid+up.1": {"head.block": "mid+up.1"},
    "head.self_conditioning=true": {"head.self_conditioning": True},
    "pretrain.gradient_checkpointing=true": {"pretrain.gradient_checkpointing": True},
    "features.noising=ddim_chain": {"features.noising": "ddim_chain"},
}


class Params(Section):
    """What decides the FLOPs of a step."""

    data: dict[str, Any]
    base: BaseParams
    lora: LoraParams
    conditioner: ConditionerParams
    head: HeadParams
    loss: LossParams
    features: FeaturesParams
    pretrain: PretrainParams


def main(arguments: Sequence[str]) -> None:
    """Print the table for a parameter file."""
    path = Path(arguments[0] if arguments else "presets/paper.yaml")
    content = read_params(path)
    print(f"{path}: GFLOPs an image\n")
    print(f"{'':38}{'training step':>16}{'':>8}{'features':>12}")
    first: tuple[float, float] | None = None
    for name, changes in VARIANTS.items():
        params = parse(Params, changed(content, changes), source=str(path))
        folder = config_folder(params.base, root=Path(), shipped=Path("presets"))
        step, features = of_training_step(params, folder), of_features(params, folder)
        first = first or (step, features)
        ratios = f"{step / first[0]:>6.2f}x", f"{features / first[1]:>6.2f}x"
        print(f"{name:38}{step:>16.3f}{ratios[0]:>8}{features:>12.3f}{ratios[1]:>8}", flush=True)


def changed(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The parameters with some dotted keys changed."""
    result = deepcopy(content)
    for key, value in changes.items():
        section, name = key.split(".")
        result[section][name] = value
    return result


def build(params: Params, folder: Path) -> ContraDiff:
    """The model on the meta device, but for the schedule, which decides which passes are made."""
    schedule = NoiseSchedule.of_base(folder)
    with torch.device("meta"):
        return ContraDiff(
            unet_without_weights(folder),
            schedule,
            lora=params.lora,
            conditioner=params.conditioner,
            head=params.head,
            image_size=params.data["image_size"],
            downsampling=downsampling_of(folder),
        )


def latent_shape(model: ContraDiff, params: Params, folder: Path) -> tuple[int, int, int]:
    """Channels and sides of a latent."""
    side = params.data["image_size"] // downsampling_of(folder)
    return model.unet.config["in_channels"], side, side


def of_training_step(params: Params, folder: Path) -> float:
    """GFLOPs an image of forward and backward."""
    model = build(params, folder).train()
    if params.pretrain.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    with torch.device("meta"):
        if params.loss.weight == 0:
            model.attention.requires_grad_(requires_grad=False)
            model.projector.requires_grad_(requires_grad=False)
        latent = latent_shape(model, params, folder)
        batch = TrainingBatch(
            latents=torch.empty(2, NUM_IMAGES, *latent),
            conditions=torch.empty(2, NUM_IMAGES, *model.conditioner.shape),
            condition_noise=torch.empty(2, NUM_IMAGES, *model.conditioner.shape),
            dropped=torch.empty(2, NUM_IMAGES, dtype=torch.bool),
            timesteps=torch.empty(2, 3, NUM_IMAGES, dtype=torch.long),
            noise=torch.empty(2, 3, NUM_IMAGES, *latent),
        )
        shared = params.conditioner.cond_view == "same"
        with FlopCounterMode(display=False) as counter:
            model(batch, loss=params.loss, shared_condition=shared)["loss"].backward()
    return counter.get_total_flops() / NUM_IMAGES / 1e9


def of_features(params: Params, folder: Path) -> float:
    """GFLOPs an image of the feature h, its condition included."""
    timesteps = params.features.timesteps
    model = build(params, folder).eval()
    with torch.device("meta"), torch.no_grad():
        latents = torch.empty(NUM_IMAGES, *latent_shape(model, params, folder))
        with FlopCounterMode(display=False) as counter:
            tokens = model.encode_condition(torch.empty(NUM_IMAGES, *model.conditioner.shape))
            if params.features.noising == "ddim_chain":
                maps = inverted_maps(model, latents, tokens, timesteps=timesteps)
            else:
                noise = torch.empty(3, *latents.shape)
                maps = model.level_maps(latents, tokens, timesteps=timesteps, noise=noise)
            model.attention(maps)
    return counter.get_total_flops() / NUM_IMAGES / 1e9
