"""pretrain: train LoRA, conditioner and attention head with reconstruction and contrastive loss."""

from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.training import Session, debug_training, follow_training

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import set_detect_anomaly

from contradiff.base.config import BaseParams, config_folder
from contradiff.base.loading import load_vae
from contradiff.config import Section, parse, read_params
from contradiff.data.pairs import PairedShards
from contradiff.method.checkpoint import save_checkpoint
from contradiff.method.compilation import compile_blocks
from contradiff.method.model import ContraDiffModel, build_model
from contradiff.method.parameter_counts import count_parameters, parameter_table
from contradiff.planning.costs import peak_bf16
from contradiff.training.flops import StepParams, of_training_step
from contradiff.training.pretraining import pretrain, write_curve
from contradiff.training.state import STATE_VERSION
from contradiff.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

BASE, IMAGES, LATENTS = Path("build/base"), Path("build/shards"), Path("build/latents")
CHECKPOINT, CURVE = Path("build/pretrain"), Path("metrics/pretrain.csv")
OVERFIT_STEPS = 100


class Params(StepParams):
    """No other sections than those of a training step."""


class BaseSection(Section):
    """Section `base`. Only `--dry-run` reads this section. Training reads build/base instead."""

    base: BaseParams


def describe(params: Params) -> str:
    base = parse(BaseSection, read_params(PARAMS_FILE), source=str(PARAMS_FILE)).base
    folder = config_folder(base, root=Path())
    return "\n" + parameter_table(folder, params, image_size=params.data.image_size)


def main(params: Params, run: Run) -> None:
    accelerator, pairs, model = prepare(params, run)
    num_vae_parameters = sum(p.numel() for p in load_vae(BASE).parameters())
    counts = count_parameters(model, num_vae_parameters=num_vae_parameters)
    run.log(f"{counts['trainable']:,} trainable and {counts['frozen']:,} frozen parameters")
    if params.warning:
        run.log(params.warning)
    num_steps = params.pretrain.epochs * (pairs.num_samples // params.pretrain.batch_size)
    watch = watch_of(params, run, num_steps=num_steps, num_processes=accelerator.num_processes)
    with follow_training(
        run, params, [BASE], pairs.digest, STATE_VERSION, watch=watch, files_checkpoint=True
    ) as session:
        # Now the main process holds the work folder's lock, and no other run changes the folder.
        accelerator.wait_for_everyone()
        facts: dict[str, Any] = {"base": BASE, "counts": counts}
        facts["image_size"] = params.data.image_size
        facts["params"] = params.model_dump(mode="json", by_alias=True)
        save = partial(save_checkpoint, model=model, **facts)
        options = keep_checkpoints(run, session, save)
        curve = pretrain(model, pairs, recipe=params, accelerator=accelerator, **options)
        if accelerator.is_main_process:
            write_curve(CURVE, curve)
            save(CHECKPOINT, num_steps=num_steps)
        accelerator.wait_for_everyone()


def debug(mode: str, params: Params, run: Run) -> None:
    """Train on the first batch alone or on the first two, or with anomaly detection; keep nothing.

    The repeated batches have the same noise and timesteps each time, so their loss can come near to
    zero. "overfit" takes `OVERFIT_STEPS` steps, whatever pretrain.epochs is.
    """
    only_batches = {"overfit": 1, "two-batches": 2}.get(mode)
    section = params.pretrain
    if mode == "overfit":
        length = {"epochs": OVERFIT_STEPS, "warmup_epochs": OVERFIT_STEPS / 10}
        section = section.model_copy(update=length)
        params = params.model_copy(update={"pretrain": section})
    accelerator, pairs, model = prepare(params, run)
    num_steps = section.epochs * (only_batches or pairs.num_samples // section.batch_size)
    watch = watch_of(params, run, num_steps=num_steps, num_processes=accelerator.num_processes)
    with set_detect_anomaly(mode == "anomaly"), debug_training(run, watch) as session:
        options: dict[str, Any] = {"accelerator": accelerator, **session}
        curve = pretrain(model, pairs, recipe=params, only_batches=only_batches, **options)
    if curve:
        first, last = curve[0], curve[-1]
        losses = f"{first['loss']:.4f} (step {first['step']:g}) to {last['loss']:.4f}"
        run.log(f"the loss went from {losses} (step {last['step']:g}); no file was written")


def prepare(params: Params, run: Run) -> tuple["Accelerator", PairedShards, ContraDiffModel]:
    """Join the other processes, open the shards, and build the model."""
    accelerator = run.accelerator(precision=params.pretrain.precision)
    pairs = PairedShards.open(run.shards(IMAGES), run.shards(LATENTS), split="train")
    model = build_model(BASE, params, image_size=params.data.image_size, seed=params.seed)
    if run.runtime.compile == "all":
        compile_blocks(model.unet)
    return accelerator, pairs, model


def watch_of(params: Params, run: Run, *, num_steps: int, num_processes: int) -> Watch:
    """Return a watch that knows the ceiling of the GPUs, if their maker's rate is known.

    It is known for bf16. In float32, CUDA takes some convolutions in TF32, at another rate.
    """
    section, ceiling = params.pretrain, None
    is_known = run.is_main and run.device.type == "cuda" and section.precision == "bf16"
    if is_known and (peak := peak_bf16(torch.cuda.get_device_name(run.device))):
        # What gradient checkpointing computes twice is no use, by MFU's definition.
        once = section.model_copy(update={"gradient_checkpointing": "none"})
        gflop = of_training_step(params.model_copy(update={"pretrain": once}), BASE)
        ceiling = num_processes * peak * 1e3 / gflop
        what = f"an image takes {gflop:,.1f} GFLOP; MFU is 100% at {ceiling:,.0f} images/s"
        run.log(f"{what} ({num_processes} x {peak:g} TFLOP/s)")
    size = section.batch_size
    return Watch(num_steps=num_steps, batch_size=size, device=run.device, ceiling=ceiling)


def keep_checkpoints(run: Run, session: Session, save: Callable[..., None]) -> Session:
    """Save a checkpoint now and every `runtime.keep_every` steps, each in a folder of its own.

    The folders are .work/checkpoints/<key of the training>/<step>. They have the weights of that
    step, not the average of pretrain.ema_decay. `python -m bench diagnostics` reads them.
    """
    every, on_step = run.runtime.keep_every, session["on_step"]
    folder = run.root / ".work/checkpoints" / session["work_dir"].name
    if not every or not run.is_main:
        return session
    save(folder / f"{0:08}", num_steps=0)

    def keep(step: int, row: Mapping[str, float] | None) -> None:
        on_step(step, row)
        if step % every == 0:
            save(folder / f"{step:08}", num_steps=step)

    run.log(f"every {every} steps, a checkpoint is kept in {folder}")
    return {**session, "on_step": keep}


def processes_without_gpu(params: Params) -> int:
    """Return 2, if two processes can share each part of a batch."""
    section = params.pretrain
    return 1 if section.batch_size % (2 * section.grad_accumulation) else 2


if __name__ == "__main__":
    execute(Params, main, parallel=True, without_gpu=processes_without_gpu, debug=debug)
