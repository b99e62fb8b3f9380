"""class_condition: train class embeddings, to generate images of a given class (Table 5).

If class_condition.epochs is 0, the stage trains nothing and writes a file that says so.
"""

from stages.runtime.run import Run, execute
from stages.runtime.training import follow_training

from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import Field

from contradiff.config import Section, Seed, parse
from contradiff.data.streams import PairedShards
from contradiff.generation import class_table
from contradiff.method.checkpoint import load_checkpoint, read_checkpoint_card
from contradiff.method.model import Architecture
from contradiff.training.state import STATE_VERSION
from contradiff.types import Precision
from contradiff.watch import Watch

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
CLASSES = Path("build/class_condition")


class Params(Architecture):
    seed: Seed
    class_condition: class_table.ClassConditionParams


class Pretrained(Section):
    precision: Precision = Field(alias="pretrain.precision")


def main(params: Params, run: Run) -> None:
    section, seed = params.class_condition, params.seed
    pairs = PairedShards.open(run.shards(IMAGES), run.shards(LATENTS), split="train")
    num_classes = len(pairs.image_index.info.class_ids)
    num_steps = class_table.count_steps(section, num_samples=pairs.num_samples)
    sizes, table = {"num_classes": num_classes, "num_steps": num_steps}, None
    with ExitStack() as stack:
        if num_steps:
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
            session = stack.enter_context(
                follow_training(run, params, inputs, digest, STATE_VERSION, watch=watch)
            )
            # The same precision as in pretraining.
            trained = read_checkpoint_card(CHECKPOINT).params
            precision = parse(Pretrained, trained, source=str(CHECKPOINT)).precision
            class_table.train_class_table(
                model, table, pairs, params=section, precision=precision, seed=seed, **session
            )
        class_table.save_class_table(CLASSES, table, checkpoint=CHECKPOINT, params=section, **sizes)


if __name__ == "__main__":
    execute(Params, main)
