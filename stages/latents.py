"""latents: image shards => shards of VAE moments of each image's crops, in the same order.

Runs on as many processes as `python -m stages.launch stages.latents` starts, with the same result.
"""

from stages._runtime import Run, execute

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from contradiff.atomic import replace_dir, replace_file
from contradiff.backbone import load_vae
from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.data.png import encode_png, image_grid
from contradiff.data.shards import (
    Shard,
    ShardIndex,
    ShardParams,
    finished_shard,
    image_of,
    read_images,
    read_shard,
    read_split,
    resume_shard,
    shard_name,
)
from contradiff.encoding import (
    Chunk,
    Reconstruction,
    check_room,
    chunks_of,
    describe_cost,
    encode_chunks,
    latents_bytes,
)
from contradiff.latents import LatentsParams, latent_facts

IMAGES = Path("build/shards")
BASE, LATENTS = Path("build/base"), Path("build/latents")
NUM_SHOWN = 48
"""Validation images in the figure, in rows of 16 above their reconstructions."""

Todo = Sequence[tuple[str, Shard, Path]]
"""Split, image shard and where its latents are written, for each shard."""


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams
    latents: LatentsParams


def main(params: Params, run: Run) -> None:
    accelerator = run.accelerator()
    index = ShardIndex.read(IMAGES)
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]
    facts = latent_facts(vae, params=params.latents, image_size=params.data.image_size)
    encode = partial(
        encode_chunks,
        vae,
        params=params.latents,
        image_size=params.data.image_size,
        seed=params.seed,
        device=run.device,
    )
    shown = params.model_dump(by_alias=True)
    del shown["latents"]["min_psnr"]  # it decides whether there are latents, not which
    with run.work_dir(shown, [IMAGES / "index.json", BASE]) as work:
        todo = [
            (split, shard, work / shard_name(split, number, params.shard.compression))
            for split in index.splits
            for number, shard in enumerate(index.shards(split))
        ]
        if accelerator.is_main_process:
            cost = latents_bytes(
                index, vae, params=params.latents, image_size=params.data.image_size
            )
            run.log(describe_cost(cost, index, params.latents))
            LATENTS.parent.mkdir(exist_ok=True)
            done = (finished_shard(path) for *_, path in todo)
            written = sum(shard.num_bytes for shard in done if shard is not None)
            check_room(sum(cost.values()) - written, [work, LATENTS.parent])
            # Before hours are spent: some latents as a reader of the shards would see them.
            images = list(islice(read_images(IMAGES, "val"), NUM_SHOWN))
            chunks = chunks_of(images, split="val", params=params.latents)
            records = [stored.to_record() for stored in encode(chunks, num_workers=0)]
            decoded = Reconstruction.of(vae, images, records, facts=facts, device=run.device)
            decoded.check(floor=params.latents.min_psnr)

        # Each process takes its share; what an interrupted run has finished is not made anew.
        mine = todo[accelerator.process_index :: accelerator.num_processes]
        mine = [item for item in mine if finished_shard(item[-1]) is None]

        def chunks_of_mine() -> Iterator[Chunk]:
            for split, shard, _ in mine:
                samples = (image_of(record) for record in read_shard(IMAGES / shard.name, shard))
                yield from chunks_of(samples, split=split, params=params.latents)

        stored = encode(chunks_of_mine(), num_workers=run.runtime.num_workers)
        with run.progress("encode", sum(shard.num_samples for _, shard, _ in mine)) as advance:
            for _, shard, path in mine:
                records = (item.to_record() for item in islice(stored, shard.num_samples))
                resume_shard(path, records, compression=params.shard.compression)
                advance(shard.num_samples)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            assemble(todo, facts)
            images = list(islice(read_images(IMAGES, "val"), NUM_SHOWN))
            records = list(islice(read_split(LATENTS, "val"), NUM_SHOWN))
            decoded = Reconstruction.of(vae, images, records, facts=facts, device=run.device)
            show(decoded, run)


def assemble(todo: Todo, facts: Mapping[str, Any]) -> None:
    """Move all shards to their place, with an index."""
    splits: dict[str, list[Shard]] = {}
    with replace_dir(LATENTS) as folder:
        for split, _, path in todo:
            shard = finished_shard(path)
            assert shard is not None, "every process has done its share"
            shutil.move(path, folder / path.name)
            splits.setdefault(split, []).append(shard)
        ShardIndex({k: tuple(v) for k, v in splits.items()}, facts).write(folder)


def show(found: Reconstruction, run: Run) -> None:
    """Write how much of an image the base's autoencoder keeps."""
    number = len(found.decoded)
    run.log(
        f"PSNR of {number} decoded val images: {found.psnr:.1f} dB; latents' std {found.std:.2f}"
    )
    content = {"psnr": found.psnr, "psnr_num_images": number, "std": found.std}
    run.write_json(Path("metrics/latents.json"), {"latents": content})
    above_and_below = zip(found.originals.split(16), found.decoded.split(16), strict=True)
    shown = [encode_png(image) for pair in above_and_below for row in pair for image in row]
    with replace_file(Path("build/figures/reconstructions.png")) as path:
        path.write_bytes(image_grid(shown, columns=16))


if __name__ == "__main__":
    execute(Params, main)
