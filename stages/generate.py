"""generate: DDIM sampling with LoRA merged => shards of PNG images, and a grid of the first."""

from stages._runtime import Run, execute

from collections.abc import Iterator
from pathlib import Path

from contradiff.atomic import replace_dir, replace_file
from contradiff.backbone import load_vae, merge_lora
from contradiff.checkpoint import load_checkpoint
from contradiff.config import Section, Seed
from contradiff.data.imagenet import DataParams
from contradiff.data.png import encode_png, image_grid
from contradiff.data.shards import Record, ShardIndex, ShardParams, write_split
from contradiff.sampling import GenerateParams, generate_unconditional, load_scheduler

BASE, CHECKPOINT = Path("build/base"), Path("build/pretrain")
GRID, GRID_IMAGES = Path("build/figures/samples.png"), 96


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams
    generate: GenerateParams


def main(params: Params, run: Run) -> None:
    scheduler = load_scheduler(BASE, num_inference_steps=params.generate.num_inference_steps)
    model = load_checkpoint(CHECKPOINT, base=BASE).to(run.device)
    merge_lora(model.unet)
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]
    first: list[bytes] = []
    with (
        replace_dir(Path("build/samples")) as folder,
        run.progress("sample", params.generate.num_samples) as advance,
    ):

        def records() -> Iterator[Record]:
            number = 0
            for images in generate_unconditional(
                model,
                vae,
                scheduler,
                params=params.generate,
                image_size=params.data.image_size,
                seed=params.seed,
                device=run.device,
                on_progress=advance,
            ):
                for image in images:
                    content = encode_png(image)
                    if number < GRID_IMAGES:
                        first.append(content)
                    yield {"__key__": f"{number:06d}".encode(), "png": content}
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
            "condition": "unconditional: c(noise)",
            "seed": params.seed,
            "num_inference_steps": params.generate.num_inference_steps,
        }
        ShardIndex({"sample": shards}, facts).write(folder)
    with replace_file(GRID) as path:
        path.write_bytes(image_grid(first, columns=16))


if __name__ == "__main__":
    execute(Params, main)
