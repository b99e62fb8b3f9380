"""The recipe of the tiny base: a latent diffusion model of a few MB, trained without labels.

In the embedded default it replaces Stable Diffusion. It is trained on other images than ContraDiff
later is (same renderer, other seeds), conditioned by cross-attention on "captions" without classes,
and then frozen. A caption is the mean colour of the image's four quadrants, projected by a fixed
random matrix. It takes the place of CLIP's text: without captions, the cross-attention that LoRA
later adapts would have learned nothing.

images (n 3 h w) in [-1, 1] -> AutoencoderKL, f = 4 -> latents (n 4 h/4 w/4) -> UNet2DConditionModel
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from contradiff.method.losses import min_snr_weights
from contradiff.training.loop import OnStep, train
from contradiff.training.state import SavedState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

CAPTION_DIM = 64
"""Cross-attention width of the tiny UNet, and so of its captions."""

MIN_SNR_GAMMA = 5.0
"""Of the denoiser's loss (Hang et al., 2023): less weight on low noise, which a glance forgives."""

WARMUP_STEPS = 200

CHECKPOINT_EVERY = 500
"""Optimiser steps between two saved states."""

M = TypeVar("M", bound=nn.Module)


def build_vae() -> "AutoencoderKL":
    """Build an AutoencoderKL with f = 4, 4 latent channels and random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
    )


def build_unet() -> "UNet2DConditionModel":
    """Build a UNet2DConditionModel for 8x8x4 latents with random weights; bottleneck 96x4x4.

    The bottleneck has 4 x 4 positions, as Stable Diffusion's has at 256 pixels. Only the bottleneck
    has attention: at 8 x 8, wider convolutions of the same cost gave a lower loss (docs/log.md).
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CAPTION_DIM,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def captions(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 4 width_c"]:
    """Make captions without labels: the quadrants' mean colours, projected by a fixed matrix."""
    generator = torch.Generator().manual_seed(20_260)
    projection = torch.randn(3, CAPTION_DIM, generator=generator)
    colours = F.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)
    return colours @ projection.to(images)


def train_vae(
    images: UInt8[Tensor, "num_images 3 height width"],
    *,
    num_steps: int,
    batch_size: int,
    lr: float,
    kl_weight: float,
    seed: int,
    accelerator: "Accelerator",
    work_dir: Path,
    on_step: OnStep,
) -> "AutoencoderKL":
    """Train the autoencoder on |x - x'| + |grad x - grad x'| + kl_weight * KL.

    The gradient term (finite differences at two scales) keeps edges that a plain L1 loss blurs.
    After an interruption, training resumes from the last checkpoint. The result has the averaged
    weights, and its scaling factor is 1 / std of the latents, as Stable Diffusion's.

    Args:
        images: Pixels, 0 to 255.
        num_steps: Number of optimiser steps.
        batch_size: Images a step, over all processes.
        lr: Peak learning rate of AdamW; one cycle of warm-up and cosine.
        kl_weight: Weight of the KL divergence to N(0, 1), per image and per pixel of the output.
        seed: Seed of the weights, the order and the noise.
        accelerator: The processes that train together, and their device.
        work_dir: Folder of the checkpoints.
        on_step: Called after every step, see `train`.

    Raises:
        ValueError: The number of processes does not divide the batch.
    """
    mine = _rows_of(accelerator, batch_size)
    device = accelerator.device
    torch.manual_seed(seed)
    vae = build_vae().to(device)  # pyright: ignore[reportArgumentType]

    def losses_of(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = _draw(images, batch_size, generator)[mine].to(device)
        posterior = vae.encode(batch).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        noise = torch.randn(batch_size, *posterior.mean.shape[1:], generator=generator)
        noise = noise[mine].to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample  # pyright: ignore[reportAttributeAccessIssue]
        reconstruction = F.l1_loss(decoded, batch)
        edges = _edge_loss(decoded, batch) + _edge_loss(
            F.avg_pool2d(decoded, 2), F.avg_pool2d(batch, 2)
        )
        kl = posterior.kl().mean() / batch[0].numel()
        loss = reconstruction + edges + kl_weight * kl
        return {"loss": loss, "l1": reconstruction, "kl": kl}

    average = _train(
        vae,
        losses_of,
        num_steps=num_steps,
        lr=lr,
        accelerator=accelerator,
        checkpoint=work_dir / "vae.safetensors",
        on_step=on_step,
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        some = _draw(images, min(2048, len(images)), generator).to(device)
        means = average.encode(some).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
    average.register_to_config(scaling_factor=round(1.0 / means.std().item(), 5))
    return average


def train_unet(
    images: UInt8[Tensor, "num_images 3 height width"],
    vae: "AutoencoderKL",
    *,
    num_steps: int,
    batch_size: int,
    lr: float,
    caption_drop: float,
    seed: int,
    accelerator: "Accelerator",
    work_dir: Path,
    on_step: OnStep,
) -> "UNet2DConditionModel":
    """Train the denoiser on Eq. 3 with min-SNR weights and uniform timesteps.

    Captions are zeroed with probability `caption_drop`, so that all-zero tokens mean
    "unconditional". Latents are drawn from the VAE's posterior once, for the image and its mirror
    image. Stops and resumes like `train_vae`.

    Args:
        images: Pixels, 0 to 255.
        vae: The trained autoencoder with its scaling factor, on the accelerator's device.
        num_steps: Number of optimiser steps.
        batch_size: Images a step, over all processes.
        lr: Peak learning rate.
        caption_drop: Probability in [0, 1].
        seed: Seed of the weights, the order and the noise.
        accelerator: The processes that train together, and their device.
        work_dir: Folder of the checkpoints.
        on_step: Called after every step, see `train`.

    Raises:
        ValueError: The number of processes does not divide the batch.
    """
    mine = _rows_of(accelerator, batch_size)
    device = accelerator.device
    torch.manual_seed(seed + 1)
    unet = build_unet().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportArgumentType]
    scheduler = build_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod
    num_train_timesteps = len(alphas_cumprod)
    weights = min_snr_weights(alphas_cumprod, gamma=MIN_SNR_GAMMA).to(device)
    latents, tokens = _encode_all(images, vae, seed=seed, device=device)

    def losses_of(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(num_train_timesteps, (batch_size,), generator=generator)
        kept = torch.rand(batch_size, 1, 1, generator=generator) >= caption_drop
        index, noise, timesteps, kept = (
            drawn[mine].to(device) for drawn in (index, noise, timesteps, kept)
        )
        noisy = scheduler.add_noise(latents[index], noise, timesteps)  # pyright: ignore[reportArgumentType]
        prediction = unet(noisy, timesteps, encoder_hidden_states=tokens[index] * kept).sample
        error = F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))
        loss = (weights[timesteps] * error).mean()
        return {"loss": loss, "error": error.mean()}

    return _train(
        unet,
        losses_of,
        num_steps=num_steps,
        lr=lr,
        accelerator=accelerator,
        checkpoint=work_dir / "unet.safetensors",
        on_step=on_step,
    )


def build_scheduler() -> "DDIMScheduler":
    """Build Stable Diffusion's noise schedule: 1000 betas, scaled linear, 0.00085 to 0.012."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def _draw(
    images: UInt8[Tensor, "num_images 3 height width"], batch_size: int, generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Draw images with replacement, in [-1, 1]; half of them are mirrored."""
    index = torch.randint(len(images), (batch_size,), generator=generator)
    batch = images[index].float().div(127.5).sub(1.0)
    mirrored = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, batch.flip(-1), batch)


def _rows_of(accelerator: "Accelerator", batch_size: int) -> slice:
    """Return a process's rows of every batch.

    Every process draws the whole batch, and the gradients are averaged, so that the number of
    processes changes only the order of float sums.
    """
    if batch_size % accelerator.num_processes:
        raise ValueError(
            f"{batch_size} images do not divide over {accelerator.num_processes} processes"
        )
    return slice(accelerator.process_index, None, accelerator.num_processes)


def _edge_loss(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences."""
    difference = first - second
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


@torch.no_grad()
def _encode_all(
    images: UInt8[Tensor, "num_images 3 height width"],
    vae: "AutoencoderKL",
    *,
    seed: int,
    device: torch.device,
) -> tuple[Float[Tensor, "twice 4 h w"], Float[Tensor, "twice 4 width_c"]]:
    """Compute scaled latents and captions of every image and of its mirror image."""
    generator = torch.Generator().manual_seed(seed)
    latents: list[Tensor] = []
    tokens: list[Tensor] = []
    for chunk in images.split(256):
        pixels = chunk.float().div(127.5).sub(1.0).to(device)
        for version in (pixels, pixels.flip(-1)):
            posterior = vae.encode(version).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            latents.append((posterior.mean + posterior.std * noise) * vae.config["scaling_factor"])
            tokens.append(captions(version))
    return torch.cat(latents).contiguous(), torch.cat(tokens)


def _train(
    model: M,
    losses_of: Callable[[int], Mapping[str, Tensor]],
    *,
    num_steps: int,
    lr: float,
    accelerator: "Accelerator",
    checkpoint: Path,
    on_step: OnStep,
) -> M:
    """Train by AdamW with warm-up and cosine; return the averaged weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    average = deepcopy(model).requires_grad_(requires_grad=False)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    saved = SavedState(checkpoint, tensors, every=CHECKPOINT_EVERY)

    def take_gradients(step: int) -> Mapping[str, Tensor]:
        losses = losses_of(step)
        losses["loss"].backward()
        if accelerator.num_processes > 1:
            trained = [p for p in model.parameters() if p.grad is not None]
            means = accelerator.reduce([p.grad for p in trained], "mean")
            for parameter, mean in zip(trained, means, strict=True):
                parameter.grad = mean
        return losses

    def rate(step: int) -> float:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        return lr * warmup * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))

    def update_average(done: int) -> None:
        decay = min(0.999, done / (done + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    train(
        take_gradients,
        steps=range(saved.resume(optimizer), num_steps),
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
