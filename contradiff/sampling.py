"""Generation: Gaussian noise -> DDIM steps -> latents -> images (Tables 4 and 5, Appendix A)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from contradiff.class_condition import ClassTable
from contradiff.config import Section
from contradiff.extraction import CleanBatch, stored_batches
from contradiff.latents import decode_latents, downsampling_factor
from contradiff.model import ContraDiff
from contradiff.types import ByteImages, Conditions, Latents, Tokens

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

TokensOf = Callable[[range], Tokens]
"""Conditions of the samples of these indices; asked for in order, from sample 0."""


class GenerateParams(Section):
    """Section `generate`. Paper: 50,000 images, 100 steps.

    Deviation: the paper names no guidance.
    """

    condition: Literal["noise", "image", "class"] = Field(
        description="noise: unconditional (App. A) | image: of the val split (Fig. 4) | "
        "class: balanced labels (Table 5)"
    )
    guidance: float = Field(ge=0, description="classifier-free; 1: none")
    num_samples: int = Field(ge=1)
    num_inference_steps: int = Field(ge=1, description="DDIM steps, eta = 0")
    batch_size: int = Field(ge=1)

    @model_validator(mode="after")
    def _noise_has_nothing_to_guide(self) -> "GenerateParams":
        if self.condition == "noise" and self.guidance != 1:
            msg = (
                f"generate.guidance is {self.guidance:g}, but generate.condition: noise is the "
                "null condition itself, with nothing to guide; set generate.guidance to 1"
            )
            raise ValueError(msg)
        return self


@dataclass(frozen=True)
class Conditioning:
    """What samples are conditioned on, and the null condition that guidance leads away from."""

    tokens: TokensOf
    null_tokens: TokensOf


def seeded_noise(
    shape: tuple[int, ...], *, seed: int, index: int, stream: str
) -> Float[Tensor, "..."]:
    """Gaussian noise of one sample: the same at any batch size, device and process count.

    Args:
        shape: of the noise.
        seed: of the run.
        index: of the sample.
        stream: "latent" or "condition": independent noises of one sample.
    """
    offset = {"latent": 0, "condition": 1}[stream]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 2 + offset)
    return torch.randn(shape, generator=generator)


def unconditional(model: ContraDiff, *, seed: int, device: torch.device) -> Conditioning:
    """A condition of Gaussian noise (App. A), c(noise): the null condition itself.

    Args:
        model: evaluation mode, on `device`.
        seed: sample i has noise of (seed, i).
        device: where to compute.
    """

    def tokens(indices: range) -> Tokens:
        noise = _stacked_noise(
            model.conditioner.shape, seed=seed, indices=indices, stream="condition"
        )
        return _encoded(model, noise.to(device))

    return Conditioning(tokens, tokens)


def image_conditional(
    model: ContraDiff,
    images: Iterator[CleanBatch],
    *,
    null_tokens: TokensOf,
    device: torch.device,
) -> Conditioning:
    """Sample i is conditioned on the i-th of `images` (Fig. 4).

    Args:
        model: evaluation mode, on `device`.
        images: one a batch, at least as many as samples; see `endless_images`.
        null_tokens: `unconditional`'s.
        device: where to compute.
    """

    def tokens(indices: range) -> Tokens:
        chosen = [
            model.conditioner.choose(pixels=image.pixels, latents=image.latents)
            for image in islice(images, len(indices))
        ]
        return _encoded(model, torch.cat(chosen).to(device))

    return Conditioning(tokens, null_tokens)


def class_conditional(table: ClassTable, *, device: torch.device) -> Conditioning:
    """Sample i is of class `balanced_label` (Table 5); the null is the table's last row.

    Args:
        table: evaluation mode, on `device`.
        device: where to compute.
    """

    def tokens_of(labels: list[int]) -> Tokens:
        with torch.inference_mode():
            return table(torch.tensor(labels, device=device))

    def tokens(indices: range) -> Tokens:
        return tokens_of([balanced_label(i, num_classes=table.null_label) for i in indices])

    def null_tokens(indices: range) -> Tokens:
        return tokens_of([table.null_label] * len(indices))

    return Conditioning(tokens, null_tokens)


def balanced_label(index: int, *, num_classes: int) -> int:
    """The class of a sample: all classes in turn."""
    return index % num_classes


def endless_images(images: Path, latents: Path, *, batch_size: int) -> Iterator[CleanBatch]:
    """Yield the val split's centre crops one by one, in order, and again from the first.

    Args:
        images: folder of image shards.
        latents: folder of their latents.
        batch_size: images read at once.
    """
    while True:
        for batch in stored_batches(images, latents, split="val", batch_size=batch_size):
            for row, key in enumerate(batch.keys):
                one = slice(row, row + 1)
                yield CleanBatch(
                    batch.first_index + row,
                    batch.latents[one],
                    batch.pixels[one],
                    batch.labels[one],
                    (key,),
                )


@torch.inference_mode()
def denoise(
    model: ContraDiff,
    scheduler: "DDIMScheduler",
    latents: Latents,
    tokens: Tokens,
    *,
    null_tokens: Tokens | None = None,
    guidance: float = 1.0,
) -> Latents:
    """Run the reverse process from pure noise, deterministically (eta = 0).

    With null tokens, by classifier-free guidance (Ho and Salimans, 2022, in the form in which 1 is
    no guidance): eps = eps_null + guidance * (eps_cond - eps_null), both in one pass.

    Args:
        model: evaluation mode.
        scheduler: with its timesteps set.
        latents: Gaussian noise.
        tokens: conditions.
        null_tokens: null conditions of the same shape; None, for guidance 1, takes half the time.
        guidance: 0 is the null condition alone, 1 the condition alone, above 1 goes beyond it.
    """
    assert null_tokens is not None or guidance == 1, "guidance needs the null condition"
    for timestep in scheduler.timesteps:
        steps = torch.full((len(latents),), int(timestep), device=latents.device)
        if null_tokens is None:
            noise_pred = model.noise_pred(latents, steps, tokens)
        else:
            both = model.noise_pred(
                latents.repeat(2, 1, 1, 1), steps.repeat(2), torch.cat([tokens, null_tokens])
            )
            conditional, null = both.chunk(2)
            noise_pred = null + guidance * (conditional - null)
        latents = scheduler.step(noise_pred, int(timestep), latents, eta=0.0).prev_sample  # pyright: ignore[reportAttributeAccessIssue]
    return latents


def generate(
    model: ContraDiff,
    vae: "AutoencoderKL",
    scheduler: "DDIMScheduler",
    *,
    conditioning: Conditioning,
    params: GenerateParams,
    image_size: int,
    seed: int,
    device: torch.device,
    on_progress: Callable[[int], None],
) -> Iterator[ByteImages]:
    """Yield batches of images, in the order of their sample indices.

    Args:
        model: evaluation mode, LoRA merged or not, on `device`.
        vae: on `device`.
        scheduler: DDIM with its timesteps set.
        conditioning: `unconditional`, `image_conditional` or `class_conditional`.
        params: counts, steps and guidance.
        image_size: side of the images.
        seed: sample i has noise of (seed, i).
        device: where to compute.
        on_progress: told the number of images of each batch.
    """
    # Not the UNet's own sample_size: Stable Diffusion's is 64, for 512 pixels.
    side = image_size // downsampling_factor(vae)
    shape = (model.unet.config["in_channels"], side, side)
    for start in range(0, params.num_samples, params.batch_size):
        indices = range(start, min(start + params.batch_size, params.num_samples))
        latents = _stacked_noise(shape, seed=seed, indices=indices, stream="latent")
        clean = denoise(
            model,
            scheduler,
            latents.to(device) * scheduler.init_noise_sigma,
            conditioning.tokens(indices),
            null_tokens=conditioning.null_tokens(indices) if params.guidance != 1 else None,
            guidance=params.guidance,
        )
        yield decode_latents(vae, clean).cpu()
        on_progress(len(indices))


@torch.inference_mode()
def _encoded(model: ContraDiff, conditions: Conditions) -> Tokens:
    return model.encode_condition(conditions)


def _stacked_noise(
    shape: tuple[int, ...], *, seed: int, indices: range, stream: str
) -> Float[Tensor, "batch ..."]:
    return torch.stack([seeded_noise(shape, seed=seed, index=i, stream=stream) for i in indices])
