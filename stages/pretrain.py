"""pretrain: train LoRA, conditioner and attention head with reconstruction and contrastive loss."""

from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.training import Session, follow_training

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from contradiff.base.config import BaseParams, config_folder
from contradiff.base.loading import load_vae
from contradiff.config import Section, parse, read_params
from contradiff.data.params import DataParams
from contradiff.data.streams import PairedShards
from contradiff.method.checkpoint import save_checkpoint
from contradiff.method.compilation import compile_blocks
from contradiff.method.model import Architecture, build_model
from contradiff.method.parameter_counts import count_parameters, parameter_table
from contradiff.training.pretraining import pretrain, write_curve
from contradiff.training.recipe import TrainingRecipe
from contradiff.training.state import STATE_VERSION

BASE, IMAGES, LATENTS = Path("build/base"), Path("build/shards"), Path("build/latents")
CHECKPOINT, CURVE = Path("build/pretrain"), Path("metrics/pretrain.csv")


class Params(TrainingRecipe, Architecture):
    data: DataParams


class BaseSection(Section):
    """Section `base`. Only `--dry-run` reads this section. Training reads build/base instead."""

    base: BaseParams


def describe(params: Params) -> str:
    base = parse(BaseSection, read_params(PARAMS_FILE), source=str(PARAMS_FILE)).base
    folder = config_folder(base, root=Path())
    return "\n" + parameter_table(folder, params, image_size=params.data.image_size)


def main(params: Params, run: Run) -> None:
    accelerator = run.accelerator(precision=params.pretrain.precision)
    pairs = PairedShards.open(run.shards(IMAGES), run.shards(LATENTS), split="train")
    image_size = params.data.image_size
    model = build_model(BASE, params, image_size=image_size, seed=params.seed)
    if run.runtime.compile == "all":
        compile_blocks(model.unet)
    num_vae_parameters = sum(p.numel() for p in load_vae(BASE).parameters())
    counts = count_parameters(model, num_vae_parameters=num_vae_parameters)
    run.log(f"{counts['trainable']:,} trainable and {counts['frozen']:,} frozen parameters")
    if params.warning:
        run.log(params.warning)
    num_steps = params.pretrain.epochs * (pairs.num_samples // params.pretrain.batch_size)
    with follow_training(
        run, params, [BASE], pairs.digest, STATE_VERSION, num_steps=num_steps, files_checkpoint=True
    ) as session:
        # Now the main process holds the work folder's lock, and no other run changes the folder.
        accelerator.wait_for_everyone()
        facts: dict[str, Any] = {"base": BASE, "image_size": image_size, "counts": counts}
        facts["params"] = params.model_dump(mode="json", by_alias=True)
        save = partial(save_checkpoint, model=model, **facts)
        options = keep_checkpoints(run, session, save)
        curve = pretrain(model, pairs, recipe=params, accelerator=accelerator, **options)
        if accelerator.is_main_process:
            write_curve(CURVE, curve)
            save(CHECKPOINT, num_steps=num_steps)
        accelerator.wait_for_everyone()


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


if __name__ == "__main__":
    execute(Params, main, parallel=True)
