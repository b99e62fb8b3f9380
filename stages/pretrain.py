"""pretrain: LoRA, conditioner and attention head learn by reconstruction + lambda * contrast.

Runs on as many processes as `python -m stages.pretrain` starts.
"""

from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.tracking import training_run

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from contradiff.base.config import BaseParams, config_folder
from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed, parse, read_params
from contradiff.data.params import DataParams
from contradiff.data.streams import PairedShards
from contradiff.files import replace_file
from contradiff.method.attention import HeadParams
from contradiff.method.budget import format_table, parameter_rows
from contradiff.method.checkpoint import save_checkpoint
from contradiff.method.conditioner import ConditionerParams
from contradiff.method.lora import LoraParams
from contradiff.method.losses import LossParams
from contradiff.method.model import build_model
from contradiff.method.noise import NoiseParams
from contradiff.method.parameter_counts import count_parameters
from contradiff.training.pretraining import pretrain
from contradiff.training.recipe import PretrainParams, TrainingRecipe
from contradiff.training.state import STATE_VERSION

BASE, IMAGES, LATENTS = Path("build/base"), Path("build/shards"), Path("build/latents")
CHECKPOINT, CURVE = Path("build/pretrain"), Path("metrics/pretrain.csv")
COLUMNS: Sequence[str] = (
    "step",
    "epoch",
    "lr",
    "loss",
    "reconstruction",
    "contrastive",
    "grad_norm",
)


class Params(Section):
    seed: Seed
    data: DataParams
    noise: NoiseParams
    lora: LoraParams
    conditioner: ConditionerParams
    head: HeadParams
    loss: LossParams
    pretrain: PretrainParams


class BaseSection(Section):
    """What `--dry-run` alone reads; training reads build/base."""

    base: BaseParams


def describe(params: Params) -> str:
    base = parse(BaseSection, read_params(PARAMS_FILE), source=str(PARAMS_FILE)).base
    rows = parameter_rows(
        config_folder(base, root=Path()),
        lora=params.lora,
        conditioner=params.conditioner,
        head=params.head,
        image_size=params.data.image_size,
    )
    return "\n" + format_table(rows)


def main(params: Params, run: Run) -> None:
    accelerator = run.accelerator(precision=params.pretrain.precision)
    pairs = PairedShards.open(run.shards(IMAGES), run.shards(LATENTS), split="train")
    model = build_model(
        BASE,
        lora=params.lora,
        conditioner=params.conditioner,
        head=params.head,
        image_size=params.data.image_size,
        seed=params.seed,
    )
    counts = count_parameters(
        model, num_vae_parameters=sum(p.numel() for p in load_vae(BASE).parameters())
    )
    run.log(f"{counts.trainable:,} trainable and {counts.frozen:,} frozen parameters")
    recipe = TrainingRecipe(
        params.seed, params.noise, params.conditioner, params.loss, params.pretrain
    )
    if recipe.warning:
        run.log(recipe.warning)
    num_steps = params.pretrain.epochs * (pairs.num_samples // params.pretrain.batch_size)
    shown = params.model_dump(mode="json", by_alias=True)
    with (
        run.work_dir(shown | {"train": pairs.digest}, [BASE], state_version=STATE_VERSION) as work,
        training_run(run, work, shown, files_checkpoint=True) as log_metrics,
        run.progress("train", num_steps, "step") as advance,
    ):
        # The main process holds the folder's lock now: what all resume from no longer changes.
        accelerator.wait_for_everyone()
        seen = 0

        def on_step(step: int, row: Mapping[str, float] | None) -> None:
            nonlocal seen
            advance(step - seen, **({"loss": f"{row['loss']:.3f}"} if row else {}))
            seen = step
            if row is not None:
                log_metrics(step, {f"train/{name}": row[name] for name in row if name != "step"})

        curve = pretrain(
            model,
            pairs,
            recipe=recipe,
            accelerator=accelerator,
            work_dir=work,
            num_workers=run.runtime.num_workers,
            log_every=run.runtime.log_every,
            checkpoint_every=run.runtime.checkpoint_every,
            on_step=on_step,
        )
        if accelerator.is_main_process:
            write_curve(CURVE, curve)
            save_checkpoint(
                CHECKPOINT,
                model,
                base=BASE,
                image_size=params.data.image_size,
                num_steps=num_steps,
                counts=counts,
                params=shown,
            )
        accelerator.wait_for_everyone()


def write_curve(path: Path, curve: Sequence[Mapping[str, float]]) -> None:
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in curve:
            numbers = {name: f"{value:.6g}" for name, value in row.items()}
            writer.writerow({**numbers, "step": int(row["step"])})


if __name__ == "__main__":
    execute(Params, main, parallel=True)
