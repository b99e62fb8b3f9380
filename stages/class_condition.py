"""class_condition: train class embeddings, to generate images of a given class (Table 5).

If class_condition.epochs is 0, the stage trains nothing and writes a file that says so.
"""

from stages.runtime.run import Run, execute
from stages.runtime.training import follow_training

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from contradiff.config import Precision, Section, Seed, parse
from contradiff.data.pairs import PairedShards
from contradiff.generation.class_table_folder import count_steps, save_class_table
from contradiff.generation.params import ClassConditionParams
from contradiff.imports import slow_import
from contradiff.method.params import Architecture
from contradiff.watch import Watch

if TYPE_CHECKING:
    from contradiff.generation.class_table import ClassTable

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
CLASSES = Path("build/class_condition")


class Params(Architecture):
    seed: Seed
    class_condition: ClassConditionParams


class Pretrained(Section):
    precision: Precision = Field(alias="pretrain.precision")


def main(params: Params, run: Run) -> None:
    section = params.class_condition
    pairs = PairedShards.open(run.shards(IMAGES), run.shards(LATENTS), split="train")
    num_steps = count_steps(section, num_samples=pairs.num_samples)
    sizes = {"num_classes": len(pairs.image_index.info.class_ids), "num_steps": num_steps}
    save = partial(save_class_table, CLASSES, checkpoint=CHECKPOINT, params=section, **sizes)
    if num_steps:
        train(params, run, pairs, save=save, **sizes)
    else:
        save(None)


def train(
    params: Params,
    run: Run,
    pairs: PairedShards,
    *,
    save: "Callable[[ClassTable], None]",
    num_classes: int,
    num_steps: int,
) -> None:
    """Train a table for the checkpoint's model, and save it. Only this needs torch."""
    with slow_import():
        import torch

        from contradiff.generation import class_table
        from contradiff.method.checkpoint import load_checkpoint, read_checkpoint_card
        from contradiff.training.state import STATE_VERSION

    section, seed = params.class_condition, params.seed
    model = load_checkpoint(CHECKPOINT, base=BASE, expected=params).to(run.device)
    class_table.choose_denoiser(model, lora=section.lora)
    torch.manual_seed(seed)
    dim = model.unet.config["cross_attention_dim"]
    table = class_table.ClassTable(
        num_classes=num_classes, width=section.width, cross_attention_dim=dim
    )
    run.log(f"training {sum(p.numel() for p in table.parameters()):,} parameters")
    inputs, digest = [BASE, CHECKPOINT], pairs.digest
    watch = Watch(num_steps=num_steps, batch_size=section.batch_size, device=run.device)
    with follow_training(run, params, inputs, digest, STATE_VERSION, watch=watch) as session:
        # The same precision as in pretraining.
        trained = read_checkpoint_card(CHECKPOINT).params
        precision = parse(Pretrained, trained, source=str(CHECKPOINT)).precision
        class_table.train_class_table(
            model, table, pairs, params=section, precision=precision, seed=seed, **session
        )
        save(table)


if __name__ == "__main__":
    execute(Params, main)
