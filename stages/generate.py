"""generate: DDIM sampling => shards of PNG images, and a grid of the first.

Unconditional, or conditioned on validation images or on classes, with or without guidance.
"""

from stages._runtime import Run, execute

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from contradiff.atomic import replace_dir, replace_file
from contradiff.backbone import load_scheduler, load_vae, merge_lora
from contradiff.checkpoint import load_checkpoint
from contradiff.class_condition import choose_denoiser, load_class_table, read_class_config
from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.data.png import encode_png, image_grid
from contradiff.data.shards import Record, ShardIndex, ShardParams, write_split
from contradiff.data.transforms import to_bytes
from contradiff.model import ContraDiff
from contradiff.sampling import (
    Conditioning,
    GenerateParams,
    balanced_label,
    class_conditional,
    endless_images,
    generate,
    image_conditional,
    unconditional,
)

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
CLASSES = Path("build/class_condition")
GRID, GRID_IMAGES, GRID_COLUMNS = Path("build/figures/samples.png"), 96, 16
CONDITIONS = {
    "noise": "unconditional: c(noise)",
    "image": "image-conditional: c(image), validation images in order",
    "class": "class-conditional: balanced labels",
}


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams
    generate: GenerateParams


def main(params: Params, run: Run) -> None:
    section = params.generate
    scheduler = load_scheduler(BASE, num_inference_steps=section.num_inference_steps)
    model = load_checkpoint(CHECKPOINT, base=BASE).to(run.device)
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]
    conditioning, num_classes = conditioning_of(params, run, model)
    first: list[bytes] = []
    with (
        replace_dir(Path("build/samples")) as folder,
        run.progress("sample", section.num_samples) as advance,
    ):

        def records() -> Iterator[Record]:
            number = 0
            for images in generate(
                model,
                vae,
                scheduler,
                conditioning=conditioning,
                params=section,
                image_size=params.data.image_size,
                seed=params.seed,
                device=run.device,
                on_progress=advance,
            ):
                for image in images:
                    content = encode_png(image)
                    if number < GRID_IMAGES:
                        first.append(content)
                    record = {"__key__": f"{number:06d}".encode(), "png": content}
                    if num_classes is not None:
                        label = balanced_label(number, num_classes=num_classes)
                        record["cls"] = str(label).encode()
                    yield record
                    number += 1

        shards = write_split(
            folder,
            "sample",
            records(),
            samples_per_shard=params.shard.samples_per_shard,
            compression=params.shard.compression,
        )
        facts = {
            "kind": "samples",
            "condition": CONDITIONS[section.condition],
            "guidance": section.guidance,
            "seed": params.seed,
            "num_inference_steps": section.num_inference_steps,
        }
        ShardIndex({"sample": shards}, facts).write(folder)
    if section.condition == "image":
        first = below_their_conditions(first, batch_size=section.batch_size)
    with replace_file(GRID) as path:
        path.write_bytes(image_grid(first, columns=GRID_COLUMNS))


def conditioning_of(params: Params, run: Run, model: ContraDiff) -> tuple[Conditioning, int | None]:
    """Return the conditions and, if they are classes, how many; prepare the model's LoRA."""
    section, device = params.generate, run.device
    if section.condition == "class":
        table = load_class_table(CLASSES, checkpoint=CHECKPOINT).to(device)
        choose_denoiser(model, lora=read_class_config(CLASSES)["lora"])
        return class_conditional(table, device=device), table.null_label
    merge_lora(model.unet)
    null = unconditional(model, seed=params.seed, device=device)
    if section.condition == "noise":
        return null, None
    images = endless_images(IMAGES, LATENTS, batch_size=section.batch_size)
    return (
        image_conditional(model, images, null_tokens=null.null_tokens, device=device),
        None,
    )


def below_their_conditions(samples: list[bytes], *, batch_size: int) -> list[bytes]:
    """Rows of conditioning images, each above the row of its samples; blanks end a short row."""
    samples = samples[: GRID_IMAGES // 2]
    images = endless_images(IMAGES, LATENTS, batch_size=batch_size)
    pixels = [to_bytes(image.pixels)[0] for image in islice(images, len(samples))]
    blanks = [encode_png(torch.full_like(pixels[0], 255))] * (-len(samples) % GRID_COLUMNS)
    conditions = [*map(encode_png, pixels), *blanks]
    samples = [*samples, *blanks]
    starts = range(0, len(samples), GRID_COLUMNS)
    rows = [slice(start, start + GRID_COLUMNS) for start in starts]
    return [image for row in rows for image in (*conditions[row], *samples[row])]


if __name__ == "__main__":
    execute(Params, main)
