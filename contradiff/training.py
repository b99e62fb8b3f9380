"""Pretraining: reconstruction + lambda * contrast (Sec. 3.4, Table 1), resumable at any step."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.conditioner import ConditionerParams
from contradiff.config import Section
from contradiff.latents import mode, sample
from contradiff.loading import (
    PairedShards,
    TrainingStream,
    ViewChoice,
    training_batches,
)
from contradiff.lora import cast_frozen_weights
from contradiff.losses import LossParams
from contradiff.model import ContraDiff, TrainingBatch
from contradiff.noise import (
    NUM_LEVELS,
    NUM_VIEWS,
    NoiseParams,
    draw_timesteps,
    timestep_probabilities,
)
from contradiff.optim import build_adamw, cosine_with_warmup, scaled_lr
from contradiff.training_state import load_training_state, save_training_state
from contradiff.types import Precision

if TYPE_CHECKING:
    from accelerate import Accelerator

CURVE_ROWS = 200
"""Rows that the stored curve has, about; live logging is as dense as the caller asks."""

OnStep = Callable[[int, Mapping[str, float] | None], None]
"""Told every step's number and, at some, its losses."""


class PretrainParams(Section):
    """Section `pretrain` (Table 1)."""

    epochs: int = Field(ge=0, description="0: the base as it is, for Table 7's first row")
    warmup_epochs: float = Field(ge=0)
    batch_size: int = Field(ge=2, description="images a step, over all processes")
    lr: float = Field(gt=0, description="peak learning rate, or its base if scale_lr")
    scale_lr: bool = Field(description="multiply lr by batch_size / 256, as MAE does")
    beta1: float = Field(ge=0, lt=1, description="the paper's momentum 0.9")
    beta2: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    grad_accumulation: int = Field(
        ge=1, description="parts that a batch is taken in; negatives are those of one part"
    )
    ema_decay: float = Field(
        ge=0, lt=1, description="the trained weights' moving average is kept; 0: the last weights"
    )
    gradient_checkpointing: bool = Field(
        description="recompute the UNet's activations in the backward pass"
    )
    precision: Precision = Field(description="of the passes, by autocast; what is trained is fp32")

    @model_validator(mode="after")
    def _parts_hold_pairs(self) -> "PretrainParams":
        parts = self.grad_accumulation
        if self.batch_size % parts or self.batch_size < 2 * parts:
            msg = (
                f"pretrain.grad_accumulation: {parts} parts of pretrain.batch_size "
                f"{self.batch_size} must be equal and of two images or more"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _warmup_ends_within_training(self) -> "PretrainParams":
        if self.epochs and self.warmup_epochs >= self.epochs:
            msg = (
                f"pretrain.warmup_epochs is {self.warmup_epochs:g}, which leaves nothing of the "
                f"{self.epochs} in pretrain.epochs: make it smaller"
            )
            raise ValueError(msg)
        return self


@dataclass(frozen=True)
class TrainingRecipe:
    """The sections that decide a training, together."""

    seed: int
    noise: NoiseParams
    conditioner: ConditionerParams
    loss: LossParams
    pretrain: PretrainParams

    @property
    def shared_condition(self) -> bool:
        """Whether both views have one condition, which is then encoded once."""
        return self.conditioner.cond_view == "same"

    @property
    def warning(self) -> str | None:
        """What a user should know who accumulates gradients of a contrastive loss."""
        parts, batch = self.pretrain.grad_accumulation, self.pretrain.batch_size
        if parts == 1 or self.loss.weight == 0:
            return None
        return (
            f"pretrain.grad_accumulation: an image is contrasted with the {batch // parts} of its "
            f"part alone, not with all {batch} of pretrain.batch_size, and the projector's "
            "BatchNorm sees as many; pretrain.gradient_checkpointing saves memory without that"
        )


def pretrain(
    model: ContraDiff,
    pairs: PairedShards,
    *,
    recipe: TrainingRecipe,
    accelerator: "Accelerator",
    work_dir: Path,
    num_workers: int,
    log_every: int,
    checkpoint_every: int,
    on_step: OnStep,
) -> list[dict[str, float]]:
    """Train the model in place; begun again with the same `work_dir`, go on where it was stopped.

    Everything random in step s is drawn from a generator seeded by (seed, s), and the data's order
    is fixed by the seed, whatever the number of processes and workers. So an interrupted training
    ends with the same weights, bit for bit on one machine with as many processes; with others, up
    to the order of float sums.

    Args:
        model: on any device; moved to the accelerator's.
        pairs: image and latent shards of the training split.
        recipe: what to do.
        accelerator: processes, device and precision.
        work_dir: where the state to resume from is kept.
        num_workers: data-loading processes.
        log_every: steps between two live reports of losses.
        checkpoint_every: steps between two saved states.
        on_step: progress callback.

    Returns:
        The curve: rows of step, epoch, lr, loss, reconstruction, contrastive, grad_norm.

    Raises:
        ValueError: the batch does not divide over the processes or is larger than the data, or the
            loss or its gradient is not finite.
    """
    params = recipe.pretrain
    num_parts = params.grad_accumulation
    local_batch = _local_batch(params.batch_size, accelerator.num_processes, num_parts)
    steps_per_epoch = pairs.num_samples // params.batch_size
    if steps_per_epoch == 0:
        msg = (
            f"pretrain.batch_size: {params.batch_size} is more than the {pairs.num_samples} images"
        )
        raise ValueError(msg)
    total_steps = params.epochs * steps_per_epoch
    if total_steps == 0:
        return []
    warmup_steps = round(params.warmup_epochs * steps_per_epoch)
    lr = scaled_lr(params.lr, batch_size=params.batch_size, enabled=params.scale_lr)
    stride = max(1, total_steps // CURVE_ROWS)

    set_up(
        model,
        loss=recipe.loss,
        gradient_checkpointing=params.gradient_checkpointing,
        precision=params.precision,
    )
    model.to(accelerator.device)
    optimizer = build_adamw(
        model.named_parameters(),
        lr=lr,
        betas=(params.beta1, params.beta2),
        weight_decay=params.weight_decay,
    )
    average = _Average(model, decay=params.ema_decay) if params.ema_decay else None
    state_file = work_dir / "state.safetensors"
    start, curve = _resume(state_file, model, optimizer, average)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    draw = _BatchDrawer(model, pairs, recipe, accelerator)
    stream = TrainingStream(
        pairs,
        choice=ViewChoice(
            recipe.loss.latent_views, recipe.conditioner.cond_view, recipe.conditioner.input
        ),
        batch_size=local_batch,
        start_step=start * num_parts,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    batches = training_batches(stream, num_workers=num_workers)
    for step in range(start, total_steps):
        scale = cosine_with_warmup(step, total_steps=total_steps, warmup_steps=warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        parts = (draw(next(batches), step * num_parts + part) for part in range(num_parts))
        losses = _accumulate_gradients(wrapped, parts, recipe, accelerator)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), params.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update()

        done = step + 1
        row = None
        if done % stride == 0 or done % log_every == 0 or done == total_steps:
            row = _row(
                done,
                epoch=done / steps_per_epoch,
                lr=lr * scale,
                losses=losses,
                grad_norm=grad_norm,
                accelerator=accelerator,
            )
            if done % stride == 0 or done == total_steps:
                curve.append(row)
        on_step(done, row)
        if done % checkpoint_every == 0 and done < total_steps:
            # The norm is one number for all processes; where it is not finite, weights are not.
            _check_finite({"grad_norm": _number(grad_norm)}, step=done)
            if accelerator.is_main_process:
                averaged = {} if average is None else {"average": average.state()}
                save_training_state(
                    state_file,
                    step=done,
                    parts={"model": model.trained_state(), **averaged},
                    optimizer=optimizer,
                    notes={"curve": json.dumps(curve)},
                )
    if average is not None:
        average.copy_to_model()
    return curve


def set_up(
    model: ContraDiff, *, loss: LossParams, gradient_checkpointing: bool, precision: Precision
) -> None:
    """Freeze what the loss does not reach, and choose which activations and weights are kept.

    Checkpointing is diffusers' own: resnets and transformer blocks are computed again in the
    backward pass, without reentrance, so that LoRA's gradients live on under a frozen input.
    """
    if loss.weight == 0:
        # The reconstruction loss never reaches them (and DDP refuses parameters without gradient).
        model.attention.requires_grad_(requires_grad=False)
        model.projector.requires_grad_(requires_grad=False)
    if precision == "bf16":
        cast_frozen_weights(model.unet)
    if gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()


def _resume(
    path: Path,
    model: ContraDiff,
    optimizer: torch.optim.Optimizer,
    average: "_Average | None",
) -> tuple[int, list[dict[str, float]]]:
    """Restore everything; returns the steps done and the curve so far: 0 and [] at the start."""
    state = load_training_state(path)
    if state is None:
        return 0, []
    model.load_trained_state(state.parts["model"])
    state.restore(optimizer)
    if average is not None:
        average.load(state.parts["average"], step=state.step)
    return state.step, json.loads(state.notes["curve"])


def _accumulate_gradients(
    wrapped: nn.Module,
    parts: Iterable[TrainingBatch],
    recipe: TrainingRecipe,
    accelerator: "Accelerator",
) -> dict[str, Tensor]:
    """Leave the mean gradient of a step's parts in the parameters; returns their mean losses."""
    num_parts = recipe.pretrain.grad_accumulation
    losses: dict[str, Tensor] = {}
    for number, batch in enumerate(parts, start=1):
        # Processes average their gradients once a step, with the last part.
        averaged = nullcontext() if number == num_parts else accelerator.no_sync(wrapped)
        with averaged:
            with accelerator.autocast():
                of_part = wrapped(batch, loss=recipe.loss, shared_condition=recipe.shared_condition)
            accelerator.backward(of_part["loss"] / num_parts)
        for name, value in of_part.items():
            mean = value.detach() / num_parts
            losses[name] = losses[name] + mean if name in losses else mean
    return losses


class _BatchDrawer:
    """Adds to the loader's views all that is random in a step."""

    def __init__(
        self,
        model: ContraDiff,
        pairs: PairedShards,
        recipe: TrainingRecipe,
        accelerator: "Accelerator",
    ) -> None:
        self.recipe, self.device = recipe, accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.shape = model.conditioner.shape
        self.scaling_factor: float = pairs.latent_index.facts["scaling_factor"]
        self.probabilities = timestep_probabilities(
            model.schedule.alphas_cumprod, schedule=recipe.noise.schedule
        ).to(self.device)

    def __call__(self, loaded: Mapping[str, Tensor], number: int) -> TrainingBatch:
        """This process's rows of batch (part of a step) `number`.

        Every process draws the whole batch's random numbers and takes its rows: they do not
        depend on the number of processes.
        """
        generator = torch.Generator(self.device)
        generator.manual_seed(self.recipe.seed * 1_000_003 + number)
        moments = loaded["moments"].to(self.device, non_blocking=True)
        _, num_images, channels, height, width = moments.shape
        whole = num_images * self.world_size
        mine = slice(self.rank * num_images, (self.rank + 1) * num_images)
        latent_shape = (channels // 2, height, width)

        def gaussian(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        posterior_noise = gaussian(NUM_VIEWS, whole, *latent_shape)[:, mine]
        if self.recipe.loss.latent_views == "same":
            posterior_noise[1] = posterior_noise[0]
        latents = sample(
            moments.flatten(0, 1),
            noise=posterior_noise.flatten(0, 1),
            scaling_factor=self.scaling_factor,
        )
        dropped = torch.rand(NUM_VIEWS, whole, generator=generator, device=self.device)[:, mine]
        dropped = dropped < self.recipe.conditioner.drop
        if self.recipe.conditioner.cond_view == "noise":
            dropped[1] = True
        return TrainingBatch(
            latents=latents.unflatten(0, (NUM_VIEWS, num_images)),
            conditions=self._conditions(loaded),
            condition_noise=gaussian(NUM_VIEWS, whole, *self.shape)[:, mine],
            dropped=dropped,
            timesteps=draw_timesteps(
                self.probabilities,
                batch_size=whole,
                recon_passes=self.recipe.loss.recon_passes,
                uniform_mix=self.recipe.noise.uniform_mix,
                generator=generator,
            )[:, :, mine],
            noise=gaussian(NUM_VIEWS, NUM_LEVELS, whole, *latent_shape)[:, :, mine],
        )

    def _conditions(self, loaded: Mapping[str, Tensor]) -> Tensor:
        """Clean images as the conditioner takes them; latents without the posterior's noise."""
        if self.recipe.conditioner.input == "pixels":
            return loaded["conditions"].to(self.device, non_blocking=True)
        moments = loaded["condition_moments"].to(self.device, non_blocking=True)
        clean = mode(moments.flatten(0, 1), scaling_factor=self.scaling_factor)
        return clean.unflatten(0, moments.shape[:2])


class _Average:
    """Exponential moving average of what is trained (diffusers' EMAModel, with its warm-up)."""

    def __init__(self, model: ContraDiff, *, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.ema = EMAModel(self.parameters, decay=decay, foreach=True)

    def update(self) -> None:
        """After an optimiser step: decay 0 at the first, min(decay, (1 + s) / (10 + s)) after s."""
        self.ema.step(self.parameters)

    def copy_to_model(self) -> None:
        self.ema.copy_to(self.parameters)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.ema.shadow_params, strict=True))

    def load(self, state: Mapping[str, Tensor], *, step: int) -> None:
        for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
            shadow.copy_(state[name])
        self.ema.optimization_step = step


def _local_batch(batch_size: int, num_processes: int, parts: int) -> int:
    """Images that one process takes at once."""
    if batch_size % (num_processes * parts):
        msg = (
            f"pretrain.batch_size: {batch_size} images do not divide over {num_processes} processes"
        )
        if parts > 1:
            msg += f" and {parts} parts (pretrain.grad_accumulation)"
        raise ValueError(msg)
    return batch_size // (num_processes * parts)


def _row(
    step: int,
    *,
    epoch: float,
    lr: float,
    losses: Mapping[str, Tensor],
    grad_norm: Tensor | None,
    accelerator: "Accelerator",
) -> dict[str, float]:
    row = {"step": float(step), "epoch": round(epoch, 4), "lr": lr}
    for name, value in losses.items():
        mean = accelerator.reduce(value.detach(), "mean")
        assert isinstance(mean, Tensor)
        row[name] = mean.item()
    row["grad_norm"] = _number(grad_norm)
    _check_finite(row, step=step)
    return row


def _number(grad_norm: Tensor | None) -> float:
    assert grad_norm is not None, "only DeepSpeed keeps it to itself"
    return grad_norm.item()


def _check_finite(values: Mapping[str, float], *, step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            msg = f"pretrain.lr: {name} is {value} at step {step}, training diverged; lower it"
            raise ValueError(msg)
