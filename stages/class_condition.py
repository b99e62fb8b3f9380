"""class_condition: a table of class embeddings learns to condition the trained model (Table 5).

With class_condition.epochs 0 there is no table, and a note that says so.
"""

from stages.runtime.run import Run, execute
from stages.runtime.training import follow_training

from functools import partial
from pathlib import Path

import torch

from contradiff.config import Section, Seed
from contradiff.data.streams import PairedShards
from contradiff.generation.class_table import (
    ClassConditionParams,
    ClassTable,
    choose_denoiser,
    count_steps,
    save_class_table,
    train_class_table,
)
from contradiff.method.checkpoint import load_checkpoint, read_config
from contradiff.training.state import STATE_VERSION

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
CLASSES = Path("build/class_condition")


class Params(Section):
    seed: Seed
    class_condition: ClassConditionParams


def main(params: Params, run: Run) -> None:
    section = params.class_condition
    pairs = PairedShards.open(run.shards(IMAGES), run.shards(LATENTS), split="train")
    num_classes = len(pairs.image_index.info.class_ids)
    num_steps = count_steps(section, num_samples=pairs.num_samples)
    save = partial(
        save_class_table,
        CLASSES,
        checkpoint=CHECKPOINT,
        num_classes=num_classes,
        num_steps=num_steps,
        params=section,
    )
    if num_steps == 0:
        save(None)
        return
    model = load_checkpoint(CHECKPOINT, base=BASE).to(run.device)
    choose_denoiser(model, lora=section.lora)
    torch.manual_seed(params.seed)
    table = ClassTable(
        num_classes=num_classes,
        width=section.width,
        cross_attention_dim=model.unet.config["cross_attention_dim"],
    )
    run.log(f"{sum(p.numel() for p in table.parameters()):,} trainable parameters")
    with follow_training(
        run,
        params.model_dump(mode="json", by_alias=True),
        [BASE, CHECKPOINT],
        data_digest=pairs.digest,
        state_version=STATE_VERSION,
        num_steps=num_steps,
        prefix="class_condition",
        files_checkpoint=False,
    ) as (work, on_step):
        train_class_table(
            model,
            table,
            pairs,
            params=section,
            # that of pretraining: the same passes of the same model
            precision=read_config(CHECKPOINT)["params"]["pretrain"]["precision"],
            seed=params.seed,
            device=run.device,
            work_dir=work,
            num_workers=run.runtime.num_workers,
            log_every=run.runtime.log_every,
            checkpoint_every=run.runtime.checkpoint_every,
            on_step=on_step,
        )
        save(table)


if __name__ == "__main__":
    execute(Params, main)
