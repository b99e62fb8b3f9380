"""Pretraining: reconstruction + lambda * contrast (Sec. 3.4, Table 1), resumable at any step."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from contradiff.data.streams import PairedShards, TrainingStream, ViewChoice, training_batches
from contradiff.method.lora import cast_frozen_weights
from contradiff.method.losses import LossParams
from contradiff.method.model import ContraDiff
from contradiff.method.objective import TrainingBatch, TrainingStep
from contradiff.training.average import WeightAverage
from contradiff.training.batch import BatchDrawer
from contradiff.training.optim import build_adamw, cosine_with_warmup, scaled_lr
from contradiff.training.recipe import Checkpointing, TrainingRecipe
from contradiff.training.state import load_training_state, save_training_state
from contradiff.types import Precision

if TYPE_CHECKING:
    from accelerate import Accelerator

CURVE_ROWS = 200
"""Rows that the stored curve has, about; live logging is as dense as the caller asks."""

OnStep = Callable[[int, Mapping[str, float] | None], None]
"""Told every step's number and, at some, its losses."""


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
        raise ValueError(
            f"pretrain.batch_size: {params.batch_size} is more than the {pairs.num_samples} images"
        )
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
    average = WeightAverage(model, decay=params.ema_decay) if params.ema_decay else None
    state_file = work_dir / "state.safetensors"
    start, curve = _resume(state_file, model, optimizer, average)
    training_step = TrainingStep(
        model,
        loss=recipe.loss,
        shared_condition=recipe.shared_condition,
        decode_batch_size=params.decode_batch_size,
    )
    wrapped, optimizer = accelerator.prepare(training_step.train(), optimizer)
    draw = BatchDrawer(model, pairs, recipe, accelerator)
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
        losses = _accumulate_gradients(wrapped, parts, accelerator, num_parts=num_parts)
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
    model: ContraDiff,
    *,
    loss: LossParams,
    gradient_checkpointing: Checkpointing,
    precision: Precision,
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
    if gradient_checkpointing != "none":
        model.unet.enable_gradient_checkpointing()
    if gradient_checkpointing == "down.0":
        checkpointed = set(model.unet.down_blocks[0].modules())
        for module in set(model.unet.modules()) - checkpointed:
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]


def _resume(
    path: Path,
    model: ContraDiff,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
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
    accelerator: "Accelerator",
    *,
    num_parts: int,
) -> dict[str, Tensor]:
    """Leave the mean gradient of a step's parts in the parameters; returns their mean losses."""
    losses: dict[str, Tensor] = {}
    for number, batch in enumerate(parts, start=1):
        # Processes average their gradients once a step, with the last part.
        averaged = nullcontext() if number == num_parts else accelerator.no_sync(wrapped)
        with averaged:
            with accelerator.autocast():
                of_part = wrapped(batch)
            accelerator.backward(of_part["loss"] / num_parts)
        for name, value in of_part.items():
            mean = value.detach() / num_parts
            losses[name] = losses[name] + mean if name in losses else mean
    return losses


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
            raise ValueError(
                f"pretrain.lr: {name} is {value} at step {step}, training diverged; lower it"
            )
