"""pretrain: train LoRA, conditioner and attention head with reconstruction and contrastive loss."""

from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.training import follow_training

from pathlib import Path

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
    if run.runtime.compile:
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
        curve = pretrain(model, pairs, recipe=params, accelerator=accelerator, **session)
        if accelerator.is_main_process:
            write_curve(CURVE, curve)
            save_checkpoint(
                CHECKPOINT,
                model,
                base=BASE,
                image_size=image_size,
                num_steps=num_steps,
                counts=counts,
                params=params.model_dump(mode="json", by_alias=True),
            )
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    execute(Params, main, parallel=True)
