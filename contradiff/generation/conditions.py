"""The conditions of generated images ("samples"): noise, images or classes.

A sample's noise and condition depend only on the sample's index, not on the batch or the process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from contradiff.generation import class_table
from contradiff.generation.class_table_folder import read_class_card
from contradiff.generation.condition_images import condition_images
from contradiff.generation.params import Condition
from contradiff.method.lora import merge_lora
from contradiff.method.model import ContraDiffModel
from contradiff.types import ByteImages, Conditions, Latents, Tokens, to_pixels

TokensOf = Callable[[range], Tokens]
"""A function from sample indices to the tokens for the UNet's cross-attention."""


@dataclass(frozen=True)
class Conditioning:
    """The samples' conditions, and the null conditions for classifier-free guidance.

    Sample i has the class i mod `num_classes`. Samples have no class if `num_classes` is None.
    """

    tokens: TokensOf
    null_tokens: TokensOf
    num_classes: int | None = None


def load_conditioning(
    condition: Condition,
    model: ContraDiffModel,
    *,
    images: Path,
    table: Path,
    checkpoint: Path,
    seed: int,
) -> Conditioning:
    """Load the conditions that generate.condition names; also merge or disable the model's LoRA.

    LoRA is disabled only if the class table was trained without LoRA. Raises ValueError if the
    images or the table are missing, or if the table was trained with another model.
    """
    if condition == "class":
        loaded = class_table.load_class_table(table, checkpoint=checkpoint)
        class_table.choose_denoiser(model, lora=read_class_card(table).lora)
        return class_conditional(loaded.to(next(model.parameters()).device))
    merge_lora(model.unet)
    null = unconditional(model, seed=seed)
    if condition == "noise":
        return null
    next(condition_images(images, start=0))  # raises ValueError now if there are no images
    return image_conditional(model, images, null_tokens=null.null_tokens)


def seeded_noise(
    shape: tuple[int, ...], *, seed: int, indices: range, stream: Literal["latent", "condition"]
) -> Float[Tensor, "batch ..."]:
    """Draw Gaussian noise of `shape` for each sample; each `stream` gets independent noise.

    The noise does not depend on batch size, device or number of processes.
    """
    offset = {"latent": 0, "condition": 1}[stream]
    own = (torch.Generator().manual_seed((seed * 1_000_003 + i) * 2 + offset) for i in indices)
    return torch.stack([torch.randn(shape, generator=generator) for generator in own])


def unconditional(model: ContraDiffModel, *, seed: int) -> Conditioning:
    """Condition samples on encoded noise, c(noise) (App. A). It is also the null condition."""

    def tokens(indices: range) -> Tokens:
        shape = model.conditioner.shape
        noise = seeded_noise(shape, seed=seed, indices=indices, stream="condition")
        return _encoded(model, noise)

    return Conditioning(tokens, tokens)


def image_conditional(
    model: ContraDiffModel, folder: Path, *, null_tokens: TokensOf
) -> Conditioning:
    """Condition sample i on image i (Fig. 4). After the last image comes the first.

    Reading is fast if samples are generated in order.
    """
    images: Iterator[tuple[ByteImages, Latents]] = iter(())
    position = -1

    def tokens(indices: range) -> Tokens:
        nonlocal images, position
        if indices.start != position:
            images = condition_images(folder, start=indices.start)
        position = indices.stop
        chosen = [
            model.conditioner.choose(pixels=to_pixels(image), latents=latent)
            for image, latent in islice(images, len(indices))
        ]
        return _encoded(model, torch.cat(chosen))

    return Conditioning(tokens, null_tokens)


def class_conditional(table: class_table.ClassTable) -> Conditioning:
    """Condition samples on all classes in turn (Table 5). The null condition is "no class"."""

    @torch.inference_mode()
    def tokens_of(labels: list[int]) -> Tokens:
        return table(torch.tensor(labels, device=table.to_tokens.weight.device))

    return Conditioning(
        lambda indices: tokens_of([index % table.null_label for index in indices]),
        lambda indices: tokens_of([table.null_label] * len(indices)),
        num_classes=table.null_label,
    )


@torch.inference_mode()
def _encoded(model: ContraDiffModel, conditions: Conditions) -> Tokens:
    return model.encode_condition(conditions.to(next(model.parameters()).device))
