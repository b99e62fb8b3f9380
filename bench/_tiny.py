"""What several rows share: a tiny random base, and models of the tiny preset on it."""

from pathlib import Path

import torch
from peft.tuners.lora import Linear

from bench._copies import ROOT
from contradiff.config import parse, read_params
from contradiff.features.params import FeaturesParams
from contradiff.method.lora_layer import LinearWithLora
from contradiff.method.model import ContraDiffModel, build_model
from contradiff.method.objective import TrainingBatch
from contradiff.toy.base_recipe import build_scheduler, build_unet, build_vae
from contradiff.training.flops import StepParams, empty_batch


class Params(StepParams):
    """The sections of a training step and of features."""

    features: FeaturesParams


def read_tiny() -> Params:
    """Read the tiny preset."""
    return parse(Params, read_params(ROOT / "presets/tiny.yaml"), source="presets/tiny.yaml")


def write_base(folder: Path) -> None:
    """Write a base with the tiny base's shapes and random weights, if it is not there yet."""
    torch.manual_seed(0)
    for name, build in (("vae", build_vae), ("unet", build_unet), ("scheduler", build_scheduler)):
        if not (folder / name).is_dir():
            build().save_pretrained(folder / name)


def random_model(base: Path, *, plain: bool = False) -> ContraDiffModel:
    """Build the tiny preset's model, with random LoRA weights (untrained LoRA has no effect).

    Our loading sets a memory layout and LoRA layers; if `plain`, diffusers and peft set both.
    """
    params = read_tiny()
    model = build_model(base, params, image_size=params.data.image_size, seed=0)
    for name, parameter in model.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if plain:
        model.unet.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        use_pefts_layers(model)
    return model.eval()


def use_pefts_layers(model: ContraDiffModel) -> None:
    """Replace our LoRA layers by those of peft, with the same weights."""
    for module in model.unet.modules():
        if isinstance(module, LinearWithLora):
            module.__class__ = Linear


def noise_batch(model: ContraDiffModel, base: Path, *, num_images: int) -> TrainingBatch:
    """Return a training batch of noise."""
    torch.manual_seed(1)
    batch = empty_batch(model, read_tiny(), base, num_images=num_images)
    for tensor in (batch.latents, batch.conditions, batch.condition_noise, batch.noise):
        tensor.normal_()
    batch.timesteps.random_(0, model.schedule.num_train_timesteps)
    batch.dropped.zero_()
    return batch
