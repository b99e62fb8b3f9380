"""How the tiny base is trained: a latent diffusion model of a few MB, trained without labels.

The tiny base replaces Stable Diffusion in the embedded default. Its autoencoder is trained on
shapes, its denoiser on images of the twelve classes in other colours (module `generic`). Without
text there is no CLIP embedding, so vectors computed from the colours of an image serve as captions.
They teach the cross-attention, which LoRA adapts later.

images (n 3 h w) in [-1, 1] -> AutoencoderKL, f = 4 -> latents (n 4 h/4 w/4) -> UNet2DConditionModel
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contradiff.method.losses import min_snr_weights
from contradiff.training.loop import OnStep, train
from contradiff.training.state import SavedState
from contradiff.types import ByteImages, Pixels, Tokens, to_pixels

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

CAPTION_DIM = 64
"""Width of the captions, which is the width of the UNet's cross-attention."""

CAPTION_DROP = 0.5
"""Probability that a caption is set to zero, so that the UNet learns "no condition" as zeros."""

KL_WEIGHT = 2e-5
"""Weight of the KL divergence to N(0, 1), which is divided by the number of values of an image."""

MIN_SNR_GAMMA = 5.0
"""gamma of the min-SNR weights (Hang et al., 2023), which give low noise less weight."""

CHECKPOINT_EVERY = 500
"""Number of optimiser steps between two saved training states."""

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Recipe:
    """Training settings: `lr` is AdamW's peak rate; the batch is shared by all processes."""

    num_steps: int
    batch_size: int
    lr: float = 2e-3
    seed: int = 0


VAE_RECIPE = Recipe(num_steps=5_500, batch_size=128)
UNET_RECIPE = Recipe(num_steps=6_000, batch_size=128)


def build_vae() -> "AutoencoderKL":
    """Build an AutoencoderKL with f = 4, 4 latent channels and random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(24, 48, 96),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        norm_num_groups=8,
        scaling_factor=1.0,
    )


def build_unet() -> "UNet2DConditionModel":
    """Build a UNet2DConditionModel for 4x8x8 latents with random weights; bottleneck 96x4x4.

    The bottleneck has 4 x 4 positions, as Stable Diffusion's has at 256 pixels. Only the bottleneck
    has attention. At 8 x 8, wider convolutions gave a lower loss than attention of the same cost.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CAPTION_DIM,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> "DDIMScheduler":
    """Build Stable Diffusion's noise schedule: 1000 betas, scaled linear, 0.00085 to 0.012."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def captions(images: Pixels) -> Tokens:
    """Make captions without labels: each quadrant's mean colour, projected by a fixed matrix."""
    generator = torch.Generator().manual_seed(20_260)
    projection = torch.randn(3, CAPTION_DIM, generator=generator)
    colours = F.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)
    return colours @ projection.to(images)


def train_vae(
    images: ByteImages,
    accelerator: "Accelerator",
    work_dir: Path,
    on_step: OnStep,
    *,
    recipe: Recipe = VAE_RECIPE,
) -> "AutoencoderKL":
    """Train the autoencoder on |x - x'| + |grad x - grad x'| + KL_WEIGHT * KL.

    The gradient term (finite differences at two scales) keeps edges sharp. Return the model with
    averaged weights; its scaling factor is 1 / std of the latents. A new call with the same
    `work_dir` resumes a stopped training. Raises ValueError if the batch size is not a multiple of
    the number of processes.
    """
    device, size = accelerator.device, recipe.batch_size
    torch.manual_seed(recipe.seed)
    vae = build_vae().to(device)  # pyright: ignore[reportArgumentType]

    def losses_of(generator: torch.Generator, mine: slice) -> dict[str, Tensor]:
        batch = _draw(images, size, generator)[mine].to(device)
        posterior = vae.encode(batch).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        noise = torch.randn(size, *posterior.mean.shape[1:], generator=generator)[mine].to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample  # pyright: ignore[reportAttributeAccessIssue]
        reconstruction = F.l1_loss(decoded, batch)
        coarse = F.avg_pool2d(decoded, 2) - F.avg_pool2d(batch, 2)
        edges = _edge_loss(decoded - batch) + _edge_loss(coarse)
        kl = posterior.kl().mean() / batch[0].numel()
        return {"loss": reconstruction + edges + KL_WEIGHT * kl, "l1": reconstruction, "kl": kl}

    checkpoint = work_dir / "vae.safetensors"
    average = _train(vae, losses_of, recipe, accelerator, checkpoint, on_step=on_step)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(recipe.seed)
        some = _draw(images, min(2048, len(images)), generator).to(device)
        means = average.encode(some).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
    average.register_to_config(scaling_factor=round(1.0 / means.std().item(), 5))
    return average


def train_unet(
    images: ByteImages,
    vae: "AutoencoderKL",
    accelerator: "Accelerator",
    work_dir: Path,
    on_step: OnStep,
    *,
    recipe: Recipe = UNET_RECIPE,
) -> "UNet2DConditionModel":
    """Train the denoiser on Eq. 3 with min-SNR weights and uniform timesteps.

    The VAE encodes each image and its mirror image only once, before training. It must be on the
    accelerator's device. Like `train_vae`, this function resumes a stopped training and may raise
    ValueError.
    """
    device, size = accelerator.device, recipe.batch_size
    torch.manual_seed(recipe.seed + 1)
    unet = build_unet().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportArgumentType]
    scheduler = build_scheduler()
    weights = min_snr_weights(
        scheduler.alphas_cumprod, gamma=MIN_SNR_GAMMA, prediction_type="epsilon"
    ).to(device)
    posterior_generator = torch.Generator().manual_seed(recipe.seed)
    encoded: list[Tensor] = []
    captioned: list[Tensor] = []
    with torch.no_grad():
        for chunk in images.split(256):
            pixels = to_pixels(chunk).to(device)
            for version in (pixels, pixels.flip(-1)):
                posterior = vae.encode(version).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
                noise = torch.randn(posterior.mean.shape, generator=posterior_generator).to(device)
                drawn = posterior.mean + posterior.std * noise
                encoded.append(drawn * vae.config["scaling_factor"])
                captioned.append(captions(version))
    latents, tokens = torch.cat(encoded).contiguous(), torch.cat(captioned)

    def losses_of(generator: torch.Generator, mine: slice) -> dict[str, Tensor]:
        index = torch.randint(len(latents), (size,), generator=generator)
        noise = torch.randn(size, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(len(weights), (size,), generator=generator)
        kept = torch.rand(size, 1, 1, generator=generator) >= CAPTION_DROP
        drawn = (index, noise, timesteps, kept)
        index, noise, timesteps, kept = (tensor[mine].to(device) for tensor in drawn)
        noisy = scheduler.add_noise(latents[index], noise, timesteps)  # pyright: ignore[reportArgumentType]
        prediction = unet(noisy, timesteps, encoder_hidden_states=tokens[index] * kept).sample
        error = F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))
        return {"loss": (weights[timesteps] * error).mean(), "error": error.mean()}

    checkpoint = work_dir / "unet.safetensors"
    return _train(unet, losses_of, recipe, accelerator, checkpoint, on_step=on_step)


def _draw(
    images: ByteImages, number: int, generator: torch.Generator
) -> Float[Tensor, "number 3 height width"]:
    """Draw images with replacement, and mirror each one with probability 0.5."""
    batch = to_pixels(images[torch.randint(len(images), (number,), generator=generator)])
    mirrored = torch.rand(number, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, batch.flip(-1), batch)


def _edge_loss(difference: Float[Tensor, "batch 3 height width"]) -> Tensor:
    """Return the mean absolute horizontal difference plus the mean absolute vertical difference."""
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def _train(
    model: M,
    losses_of: Callable[[torch.Generator, slice], dict[str, Tensor]],
    recipe: Recipe,
    accelerator: "Accelerator",
    checkpoint: Path,
    *,
    on_step: OnStep,
) -> M:
    """Train with AdamW, warm-up and cosine decay; return the model with averaged weights.

    Every process draws the complete batch and uses only its own rows. The number of processes thus
    changes only the order of float sums.
    """
    if recipe.batch_size % (world_size := accelerator.num_processes):
        raise ValueError(f"{world_size} processes cannot share {recipe.batch_size} images equally")
    mine = slice(accelerator.process_index, None, world_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    average = deepcopy(model).requires_grad_(requires_grad=False)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    saved = SavedState(checkpoint, tensors, every=CHECKPOINT_EVERY)

    def take_gradients(step: int) -> dict[str, Tensor]:
        losses = losses_of(torch.Generator().manual_seed(recipe.seed * 1_000_003 + step), mine)
        losses["loss"].backward()
        if world_size > 1:
            trained = [p for p in model.parameters() if p.grad is not None]
            means = accelerator.reduce([p.grad for p in trained], "mean")
            for parameter, mean in zip(trained, means, strict=True):
                parameter.grad = mean
        return losses

    def rate(step: int) -> float:
        warmup = min(1.0, (step + 1) / 200)
        return recipe.lr * warmup * 0.5 * (1.0 + math.cos(math.pi * step / recipe.num_steps))

    def update_average(done: int) -> None:
        decay = min(0.999, done / (done + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    train(
        take_gradients,
        steps=range(saved.resume(optimizer), recipe.num_steps),
        optimizer=optimizer,
        lr=rate,
        lr_key="lr",
        is_reported=lambda _: True,
        on_step=on_step,
        clipped=model.parameters(),
        max_grad_norm=1.0,
        update_average=update_average,
        saved=saved,
        accelerator=accelerator,
    )
    return average.eval()
