"""What samples are conditioned on: noise, images or classes.

Noise and condition depend on a sample's index alone, in whatever batch and process it is made.
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
        tokens: the conditions.
        null_tokens: the null conditions that guidance leads away from.
        num_classes: sample i is of class i mod num_classes; None: samples have no class.
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
    """Load what `generate.condition` names, and prepare the model's LoRA for it.

    Args:
        condition: noise | image | class.
        model: evaluation mode, on `device`; its LoRA is merged, or disabled as the table says.
        images: folder of the images to condition on.
        table: folder of the class table.
        checkpoint: folder of the model.
        seed: of conditions of noise.
        device: where to compute.

    Raises:
        ValueError: the images or the table are missing, or the table is of another model.
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
    """Gaussian noise of some samples: the same at any batch size, device and process count.

    Args:
        shape: of one sample's noise.
        seed: of the run.
        indices: of the samples.
        stream: independent noises of one sample.
    """
    offset = {"latent": 0, "condition": 1}[stream]
    seeds = ((seed * 1_000_003 + index) * 2 + offset for index in indices)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(own)) for own in seeds]
    )


def unconditional(model: ContraDiff, *, seed: int, device: torch.device) -> Conditioning:
    """A condition of Gaussian noise (App. A), c(noise): the null condition itself.

    Args:
        model: evaluation mode, on `device`.
        seed: sample i has noise of (seed, i).
        device: where to compute.
    """

    def tokens(indices: range) -> Tokens:
        shape = model.conditioner.shape
        noise = seeded_noise(shape, seed=seed, indices=indices, stream="condition")
        return _encoded(model, noise.to(device))

    return Conditioning(tokens, tokens)


def image_conditional(
    model: ContraDiff, folder: Path, *, null_tokens: TokensOf, device: torch.device
) -> Conditioning:
    """Sample i is conditioned on the i-th image (Fig. 4); after the last image comes the first.

    Samples that are made in order read each image once.

    Args:
        model: evaluation mode, on `device`.
        folder: of the images, as `write_conditions` left it.
        null_tokens: `unconditional`'s.
        device: where to compute.
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
    """All classes in turn (Table 5); the null condition is the table's last row.

    Args:
        table: evaluation mode, on `device`.
        device: where to compute.
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
