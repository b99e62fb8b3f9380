"""A training step beside diffusers' LoRA step and beside seven passes: same UNet, same images.

diffusers' text-to-image LoRA example noises a latent once and runs the whole UNet once. Ours runs
half of the UNet for five more noisy latents. A naive version of our step runs the whole UNet seven
times, with a hook on the bottleneck. All three clip the gradient and take a step of AdamW.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench._tiny import noise_batch, random_model, read_tiny, write_base
from bench._turns import Row, compare, relative_error
from contradiff.method.attention import order_by_noise
from contradiff.method.losses import CONTRASTIVE_LOSSES
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import add_noise
from contradiff.method.objective import TrainingBatch
from contradiff.training.flops import training_step
from contradiff.training.optim import build_adamw

TOLERANCE = 1e-5
Loss = Callable[[], Tensor]


def rows(folder: Path, *, rounds: int, num_images: int = 32) -> Iterator[Row]:
    """Yield the rows. Equality is that of losses, and for the seven passes of all gradients."""
    write_base(folder)
    params, model = read_tiny(), random_model(folder)
    plain = random_model(folder, plain=True)
    batch = noise_batch(model, folder, num_images=num_images)
    objective = training_step(model, params)
    reconstruction = params.loss.model_copy(update={"weight": 0.0})
    alone = params.model_copy(update={"loss": reconstruction})
    ours: Loss = lambda: objective(batch)["loss"]  # noqa: E731
    naive: Loss = lambda: seven_passes(plain.train(), batch)  # noqa: E731
    tokens = plain.encode_condition(batch.conditions[0]).detach()
    theirs: Loss = lambda: lora_loss(plain, batch, tokens)  # noqa: E731

    def error_of_reconstruction() -> float:
        without_contrast = training_step(model, alone)(batch)["loss"]
        return relative_error(without_contrast.detach(), theirs().detach())

    work = count(model, ours) / count(plain, theirs)
    yield compare(
        "training step",
        "diffusers' LoRA step, one noisy latent an image",
        (updating(model, ours), updating(plain, theirs)),
        rounds=rounds,
        kind="time",
        goal=2.3,
        error=error_of_reconstruction,
        tolerance=TOLERANCE,
        note=f"for {work:.2f} × its FLOPs; equal: the reconstruction loss",
    )
    work = count(model, ours) / count(plain, naive)
    yield compare(
        "training step",
        "seven whole passes with a hook",
        (updating(model, ours), updating(plain, naive)),
        rounds=rounds,
        kind="time",
        goal=0.45,
        error=lambda: relative_error(gradients(model, ours), gradients(plain, naive)),
        tolerance=1e-3,
        note=f"for {work:.2f} × its FLOPs; equal: all gradients",
    )


def lora_loss(model: ContraDiffModel, batch: TrainingBatch, tokens: Tensor) -> Tensor:
    """The loss of diffusers' example, for the first noisy latent of each image."""
    noise, steps = batch.noise[0, 0], batch.timesteps[0, 0]
    noisy = add_noise(batch.latents[0], noise, steps, model.schedule.alphas_cumprod)
    predicted = model.unet(noisy, steps, tokens, return_dict=False)[0]
    return F.mse_loss(predicted.float(), noise.float())


def seven_passes(model: ContraDiffModel, batch: TrainingBatch) -> Tensor:
    """Our loss as it would be written with diffusers' UNet alone."""
    loss, alphas = read_tiny().loss, model.schedule.alphas_cumprod
    tokens = [model.encode_condition(conditions) for conditions in batch.conditions]
    maps: list[Tensor] = []
    assert isinstance(model.unet.mid_block, nn.Module)
    hook = model.unet.mid_block.register_forward_hook(lambda *given: maps.append(given[-1]))
    for view, latents in enumerate(batch.latents):
        for noise, steps in zip(batch.noise[view], batch.timesteps[view], strict=True):
            seen = tokens[min(view, len(tokens) - 1)]
            model.unet(add_noise(latents, noise, steps, alphas), steps, seen, return_dict=False)
    hook.remove()
    views: list[Tensor] = []
    for view, steps in enumerate(batch.timesteps):
        levels = torch.stack(maps[3 * view : 3 * view + 3])
        views.append(model.attention(order_by_noise(levels, steps)))
    view1, view2 = model.projector(torch.cat(views)).chunk(2)
    contrast = CONTRASTIVE_LOSSES[loss.contrastive]
    contrastive = contrast(view1, view2, temperature=loss.temperature)
    return lora_loss(model, batch, tokens[0]) + loss.weight * contrastive


def updating(model: ContraDiffModel, loss: Loss) -> Callable[[], None]:
    """A step of the optimiser. Its rate of 0 costs the same, and keeps the rounds equal."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_adamw(model.named_parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)

    def update() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def gradients(model: ContraDiffModel, loss: Loss) -> Tensor:
    """The gradients of all trained weights."""
    loss().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def count(model: ContraDiffModel, loss: Loss) -> int:
    """Count the FLOPs of a loss and its gradients."""
    with FlopCounterMode(display=False) as counter:
        gradients(model, loss)
    return counter.get_total_flops()
