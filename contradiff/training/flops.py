"""Counts the FLOPs of a training step, without weights and without data.

torch's FlopCounterMode counts matrix products, convolutions and attention, forward and backward,
from the tensors' shapes. So the number is exact and equal on all machines.
"""

from pathlib import Path

import torch

from contradiff.base.config import downsampling_of
from contradiff.base.loading import NoiseSchedule, unet_without_weights
from contradiff.config import Precision
from contradiff.data.params import DataParams
from contradiff.method.model import ContraDiffModel
from contradiff.method.objective import TrainingBatch, TrainingStep
from contradiff.method.params import Architecture
from contradiff.training.pretraining import set_up
from contradiff.training.recipe import TrainingRecipe

NUM_IMAGES = 4
"""Images in a counted step. The FLOPs per image hardly depend on this number."""


class StepParams(TrainingRecipe, Architecture):
    """The sections on which a training step depends."""

    data: DataParams


def of_training_step(params: StepParams, folder: Path) -> float:
    """Count the GFLOPs per image of a training step. The precision does not matter.

    `folder` has the base's configuration. Work that `pretrain.gradient_checkpointing` does twice
    counts twice.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = build(params, folder)
    with torch.device("meta"):
        batch = empty_batch(model, params, folder, num_images=NUM_IMAGES)
        with FlopCounterMode(display=False) as counter:
            training_step(model, params)(batch)["loss"].backward()
    return counter.get_total_flops() / NUM_IMAGES / 1e9


def build(params: StepParams, folder: Path, *, precision: Precision = "fp32") -> ContraDiffModel:
    """Build the model for training on the meta device, without values of the weights."""
    schedule = NoiseSchedule.of_base(folder)
    sizes = {"image_size": params.data.image_size, "downsampling": downsampling_of(folder)}
    with torch.device("meta"):
        model = ContraDiffModel(unet_without_weights(folder), schedule, params, **sizes)
    blocks = params.pretrain.gradient_checkpointing
    set_up(model, loss=params.loss, gradient_checkpointing=blocks, precision=precision)
    return model


def training_step(model: ContraDiffModel, params: StepParams) -> TrainingStep:
    """Return the training step with the loss of the parameter file."""
    decode_batch_size = params.pretrain.decode_batch_size
    return TrainingStep(model, loss=params.loss, decode_batch_size=decode_batch_size).train()


def empty_batch(
    model: ContraDiffModel, params: StepParams, folder: Path, *, num_images: int
) -> TrainingBatch:
    """Return a training batch of uninitialised tensors on torch's default device."""
    side = params.data.image_size // downsampling_of(folder)
    latent = model.unet.config["in_channels"], side, side
    views = {"same": 1, "noise_both": 3}.get(params.conditioner.cond_view, 2), num_images
    return TrainingBatch(
        latents=torch.empty(2, num_images, *latent),
        conditions=torch.empty(*views, *model.conditioner.shape),
        condition_noise=torch.empty(*views, *model.conditioner.shape),
        dropped=torch.empty(*views, dtype=torch.bool),
        timesteps=torch.empty(2, 3, num_images, dtype=torch.long),
        noise=torch.empty(2, 3, num_images, *latent),
    )
