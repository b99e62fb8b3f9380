"""What samples are conditioned on: noise, images or classes.

A sample's noise and condition depend only on its index, not on its batch or process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from contradiff.generation.class_table import (
    ClassTable,
    choose_denoiser,
    load_class_table,
    read_class_config,
)
from contradiff.generation.condition_images import ConditionImage, condition_images
from contradiff.method.lora import merge_lora
from contradiff.method.model import ContraDiff
from contradiff.types import Conditions, Tokens, to_pixels

TokensOf = Callable[[range], Tokens]
"""Conditions of the samples of these indices."""
Condition = Literal["noise", "image", "class"]
DESCRIPTIONS: dict[Condition, str] = {
    "noise": "unconditional: c(noise)",
    "image": "image-conditional: c(image), validation images in order",
    "class": "class-conditional: balanced labels",
}


@dataclass(frozen=True)
class Conditioning:
    """What samples are conditioned on.

    Attributes:
        tokens: The conditions.
        null_tokens: The null conditions of classifier-free guidance.
        num_classes: Sample i has the class i mod num_classes; None: samples have no class.
    """

    tokens: TokensOf
    null_tokens: TokensOf
    num_classes: int | None = None


def load_conditioning(
    condition: Condition,
    model: ContraDiff,
    *,
    images: Path,
    table: Path,
    checkpoint: Path,
    seed: int,
    device: torch.device,
) -> Conditioning:
    """Load the conditions that `generate.condition` names, and prepare the model's LoRA for them.

    Args:
        condition: noise | image | class.
        model: In evaluation mode, on `device`; its LoRA is merged, or disabled if the table was
            trained without it.
        images: Folder of the images to condition on.
        table: Folder of the class table.
        checkpoint: Folder of the model.
        seed: Seed of the noise that samples are conditioned on.
        device: Device to compute on.

    Raises:
        ValueError: The images or the table are missing, or the table belongs to another model.
    """
    if condition == "class":
        loaded = load_class_table(table, checkpoint=checkpoint).to(device)
        choose_denoiser(model, lora=read_class_config(table)["lora"])
        return class_conditional(loaded, device=device)
    merge_lora(model.unet)
    null = unconditional(model, seed=seed, device=device)
    if condition == "noise":
        return null
    next(condition_images(images, start=0))  # refused now, if there are none
    return image_conditional(model, images, null_tokens=null.null_tokens, device=device)


def seeded_noise(
    shape: tuple[int, ...], *, seed: int, indices: range, stream: Literal["latent", "condition"]
) -> Float[Tensor, "batch ..."]:
    """Draw Gaussian noise that does not depend on batch size, device or number of processes.

    Args:
        shape: Shape of one sample's noise.
        seed: Seed of the run.
        indices: Indices of the samples.
        stream: A sample has independent noise for each value of `stream`.
    """
    offset = {"latent": 0, "condition": 1}[stream]
    seeds = ((seed * 1_000_003 + index) * 2 + offset for index in indices)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(own)) for own in seeds]
    )


def unconditional(model: ContraDiff, *, seed: int, device: torch.device) -> Conditioning:
    """Condition samples on Gaussian noise, c(noise), which is also the null condition (App. A).

    Args:
        model: In evaluation mode, on `device`.
        seed: Sample i has noise with the seed (seed, i).
        device: Device to compute on.
    """

    def tokens(indices: range) -> Tokens:
        shape = model.conditioner.shape
        noise = seeded_noise(shape, seed=seed, indices=indices, stream="condition")
        return _encoded(model, noise.to(device))

    return Conditioning(tokens, tokens)


def image_conditional(
    model: ContraDiff, folder: Path, *, null_tokens: TokensOf, device: torch.device
) -> Conditioning:
    """Condition sample i on the i-th image (Fig. 4); after the last image comes the first.

    Samples that are generated in order read each image once.

    Args:
        model: In evaluation mode, on `device`.
        folder: Folder of the images that `write_conditions` wrote.
        null_tokens: The null conditions of `unconditional`.
        device: Device to compute on.
    """
    images: Iterator[ConditionImage] = iter(())
    position = -1

    def tokens(indices: range) -> Tokens:
        nonlocal images, position
        if indices.start != position:
            images = condition_images(folder, start=indices.start)
        position = indices.stop
        chosen = [
            model.conditioner.choose(pixels=to_pixels(item.image), latents=item.latent)
            for item in islice(images, len(indices))
        ]
        return _encoded(model, torch.cat(chosen).to(device))

    return Conditioning(tokens, null_tokens)


def class_conditional(table: ClassTable, *, device: torch.device) -> Conditioning:
    """Condition samples on all classes in turn (Table 5); the null condition is the last row.

    Args:
        table: In evaluation mode, on `device`.
        device: Device to compute on.
    """

    @torch.inference_mode()
    def tokens_of(labels: list[int]) -> Tokens:
        return table(torch.tensor(labels, device=device))

    return Conditioning(
        lambda indices: tokens_of([index % table.null_label for index in indices]),
        lambda indices: tokens_of([table.null_label] * len(indices)),
        num_classes=table.null_label,
    )


@torch.inference_mode()
def _encoded(model: ContraDiff, conditions: Conditions) -> Tokens:
    return model.encode_condition(conditions)
