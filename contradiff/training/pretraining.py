"""Pretraining with reconstruction + lambda * contrast (Sec. 3.4, Table 1); it can be resumed."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from contradiff.config import Precision
from contradiff.data.pairs import PairedShards
from contradiff.data.streams import TrainingStream, training_batches
from contradiff.files import replace_file
from contradiff.method.lora import cast_frozen_weights
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import timestep_probabilities
from contradiff.method.objective import TrainingStep
from contradiff.method.params import LossParams
from contradiff.training.batch import ViewChooser, draw_batch
from contradiff.training.loop import OnStep, train
from contradiff.training.optim import WeightAverage, build_adamw, cosine_with_warmup
from contradiff.training.recipe import Checkpointing, TrainingRecipe
from contradiff.training.state import SavedState
from contradiff.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

CURVE_COLUMNS = ("step", "epoch", "lr", "loss", "reconstruction", "contrastive", "grad_norm")
CURVE_ROWS = 200
"""The stored loss curve has about this many rows. The log may show other steps."""


def pretrain(
    model: ContraDiffModel,
    pairs: PairedShards,
    *,
    recipe: TrainingRecipe,
    accelerator: "Accelerator",
    work_dir: Path,
    num_workers: int,
    log_every: int,
    checkpoint_every: int,
    on_step: OnStep,
    watch: Watch,
    only_batches: int | None = None,
) -> list[dict[str, float]]:
    """Train the model in place; a new call with the same `work_dir` resumes a stopped training.

    A resumed training ends with the same weights as an uninterrupted training. They are equal bit
    for bit if the machine and the number of processes are the same, otherwise up to the order of
    float sums. Return the loss curve: rows with the columns `CURVE_COLUMNS`. `watch` measures how
    long the training waits for its batches.

    With `only_batches`, an epoch has only so many batches, and all epochs have the same: the same
    images, noise and timesteps. This serves to find faults, and can not be resumed.

    Raises ValueError if the batch is larger than the data, if processes and microbatches cannot
    share it equally, or if the training diverges.
    """
    params, microbatches, seed = recipe.pretrain, recipe.pretrain.grad_accumulation, recipe.seed
    num_processes = accelerator.num_processes
    if params.batch_size % (num_processes * microbatches):
        raise ValueError(
            f"pretrain.batch_size: {params.batch_size} must be a multiple of {num_processes} "
            f"(processes) times {microbatches} (pretrain.grad_accumulation); change one of them"
        )
    steps_per_epoch = pairs.num_samples // params.batch_size
    if steps_per_epoch == 0:
        fault = f"{params.batch_size} is more than the {pairs.num_samples} images"
        raise ValueError(f"pretrain.batch_size: {fault}; lower pretrain.batch_size")
    total_steps = params.epochs * (steps_per_epoch := only_batches or steps_per_epoch)
    if total_steps == 0:
        return []
    warmup_steps = round(params.warmup_epochs * steps_per_epoch)
    lr = params.lr * params.batch_size / 256 if params.scale_lr else params.lr

    checkpointing, precision = params.gradient_checkpointing, params.precision
    set_up(model, loss=recipe.loss, gradient_checkpointing=checkpointing, precision=precision)
    named, betas = model.to(accelerator.device).named_parameters(), (params.beta1, params.beta2)
    optimizer = build_adamw(named, lr=lr, betas=betas, weight_decay=params.weight_decay)
    objective = TrainingStep(model, loss=recipe.loss, decode_batch_size=params.decode_batch_size)
    objective, optimizer = accelerator.prepare(objective.train(), optimizer)
    # Only now: with several processes, `prepare` gives BatchNorm's statistics other tensors.
    tensors = {f"model.{name}": tensor for name, tensor in model.trained_state().items()}
    average = WeightAverage(model, decay=params.ema_decay) if params.ema_decay else None
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.tensors.items()}
    saved = SavedState(work_dir / "state.safetensors", tensors, every=checkpoint_every)
    start = saved.resume(optimizer)
    views, cond = recipe.loss.latent_views, recipe.conditioner
    stream = TrainingStream(
        pairs,
        make_batch=ViewChooser(
            pairs, latent_views=views, cond_view=cond.cond_view, condition=cond.input, seed=seed
        ),
        with_images=cond.input == "pixels",
        batch_size=params.batch_size // (num_processes * microbatches),
        start_step=start * microbatches,
        seed=seed,
        rank=accelerator.process_index,
        world_size=num_processes,
    )
    period = only_batches * microbatches if only_batches else None
    batches = training_batches(stream, num_workers=num_workers)
    batches = watch.waiting(cycle(islice(batches, period)) if period else batches)
    alphas, schedule = model.schedule.alphas_cumprod, recipe.noise.schedule
    probabilities = timestep_probabilities(alphas, schedule=schedule).to(accelerator.device)

    def take_gradients(step: int) -> dict[str, Tensor | float]:
        """Compute the mean gradient of the step's microbatches; return their mean losses."""
        means: dict[str, Tensor | float] = {"epoch": round((step + 1) / steps_per_epoch, 4)}
        for number in range(step * microbatches, (step + 1) * microbatches):
            batch = draw_batch(
                next(batches),
                number=number % period if period else number,
                model=model,
                recipe=recipe,
                probabilities=probabilities,
                scaling_factor=pairs.latent_index.info.scaling_factor,
                accelerator=accelerator,
            )
            # Processes average their gradients only after the last microbatch of a step.
            is_last = number == (step + 1) * microbatches - 1
            with nullcontext() if is_last else accelerator.no_sync(objective):
                with accelerator.autocast():
                    losses = objective(batch)
                accelerator.backward(losses["loss"] / microbatches)
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value.detach() / microbatches
        return means

    curve_stride = max(1, total_steps // CURVE_ROWS)

    def keep_curve(done: int, row: Mapping[str, float] | None) -> None:
        if row is not None and (done % curve_stride == 0 or done == total_steps):
            saved.curve.append(dict(row))
        on_step(done, row)

    train(
        take_gradients,
        steps=range(start, total_steps),
        optimizer=optimizer,
        lr=lambda step: (
            lr * cosine_with_warmup(step, total_steps=total_steps, warmup_steps=warmup_steps)
        ),
        lr_key="pretrain.lr",
        is_reported=lambda done: done % log_every == 0 or done % curve_stride == 0,
        on_step=keep_curve,
        clipped=model.parameters(),
        max_grad_norm=params.max_grad_norm,
        update_average=average.update if average else None,
        saved=saved,
        accelerator=accelerator,
    )
    if average is not None:
        average.ema.copy_to(average.parameters)
    return saved.curve


def write_curve(path: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """Write a curve as CSV with six significant digits; without rows, write only the header."""
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(
            file, CURVE_COLUMNS, restval="", lineterminator="\n"
        )
        writer.writeheader()
        for row in curve:
            numbers = {name: f"{value:.6g}" for name, value in row.items()}
            writer.writerow({**numbers, "step": int(row["step"])})


def set_up(
    model: ContraDiffModel,
    *,
    loss: LossParams,
    gradient_checkpointing: Checkpointing,
    precision: Precision,
) -> None:
    """Freeze modules that get no gradient, and apply the settings that save memory.

    With gradient checkpointing, the backward pass recomputes resnets and transformer blocks. LoRA
    still gets gradients, because diffusers' checkpointing is non-reentrant.
    """
    if loss.weight == 0:
        # Only the contrastive loss trains these, and DDP refuses parameters without gradient.
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
