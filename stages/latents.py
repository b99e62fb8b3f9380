"""latents: image shards => shards of VAE moments of each image's crops, in the same order.

Runs on as many processes as `python -m stages.latents` starts, with the same
result.
"""

from stages.runtime.run import Run, execute

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed
from contradiff.data.encoding import (
    Chunk,
    Reconstruction,
    chunks_of,
    describe_cost,
    encode_chunks,
    latents_bytes,
)
from contradiff.data.latents import LatentsParams, latent_info
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.params import DataParams
from contradiff.data.png import encode_png, image_grid
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import (
    Shard,
    ShardIndex,
    ShardParams,
    finished_shard,
    image_of,
    read_images,
    read_shard,
    read_split,
    shard_name,
    write_noted_shard,
)
from contradiff.files import check_free_space, explain_full_disk, replace_dir, replace_file

IMAGES = Path("build/shards")
BASE, LATENTS = Path("build/base"), Path("build/latents")
NUM_SHOWN = 48
"""Validation images that are checked, and shown in a figure."""
COLUMNS = 16
"""Of the figure: rows of images, each above the row of their reconstructions."""

Todo = Sequence[tuple[str, Shard, Path]]
"""Split, image shard and where its latents are written, for each shard."""


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams
    latents: LatentsParams


def main(params: Params, run: Run) -> None:
    accelerator = run.accelerator()
    index = ShardIndex.read(IMAGES, ImageInfo)
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]
    info = latent_info(vae, params=params.latents, image_size=params.data.image_size)
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
    with run.work_dir(shown, [IMAGES / "index.json", BASE], state_version=STATE_VERSION) as work:
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
            for place in (work, LATENTS.parent):
                check_free_space(
                    place,
                    sum(cost.values()) - written,
                    ways_out="lower latents.views or switch latents.flips off",
                )
            # Before hours are spent: some latents as a reader of the shards would see them.
            images = list(islice(read_images(IMAGES, "val"), NUM_SHOWN))
            chunks = chunks_of(images, split="val", params=params.latents)
            records = [stored.to_record() for stored in encode(chunks, num_workers=0)]
            decoded = Reconstruction.of(vae, images, records, info=info, device=run.device)
            decoded.check(floor=params.latents.min_psnr)
        # The main process holds the folder's lock now and has found room enough.
        accelerator.wait_for_everyone()

        # Each process takes its share; what an interrupted run has finished is not made anew.
        mine = todo[accelerator.process_index :: accelerator.num_processes]
        mine = [item for item in mine if finished_shard(item[-1]) is None]

        def chunks_of_mine() -> Iterator[Chunk]:
            for split, shard, _ in mine:
                samples = (image_of(record) for record in read_shard(IMAGES / shard.name, shard))
                yield from chunks_of(samples, split=split, params=params.latents)

        stored = encode(chunks_of_mine(), num_workers=run.runtime.num_workers)
        num_mine = sum(shard.num_samples for _, shard, _ in mine)
        with explain_full_disk(work), run.progress("encode", num_mine) as advance:
            for _, shard, path in mine:
                records = (item.to_record() for item in islice(stored, shard.num_samples))
                # unconditionally: `stored` goes on to the next shard only when this one is taken
                write_noted_shard(path, records, compression=params.shard.compression)
                advance(shard.num_samples)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with replace_dir(LATENTS) as folder:
                assemble(todo, info, folder)
                images = list(islice(read_images(IMAGES, "val"), NUM_SHOWN))
                records = list(islice(read_split(folder, "val"), NUM_SHOWN))
                decoded = Reconstruction.of(vae, images, records, info=info, device=run.device)
                decoded.check(floor=params.latents.min_psnr)  # what was written, this time
            show(decoded, run)


def assemble(todo: Todo, info: LatentInfo, folder: Path) -> None:
    """Move all shards to `folder`, with an index."""
    splits: dict[str, list[Shard]] = {}
    for split, _, path in todo:
        shard = finished_shard(path)
        assert shard is not None, "every process has done its share"
        splits.setdefault(split, []).append(shard)
    with explain_full_disk(folder.parent):
        # The index first: on a full disk it is what fails, and the shards are still in their place.
        ShardIndex({k: tuple(v) for k, v in splits.items()}, info).write(folder)
        for *_, path in todo:
            shutil.move(path, folder / path.name)


def show(found: Reconstruction, run: Run) -> None:
    """Write how much of an image the base's autoencoder keeps."""
    number = len(found.decoded)
    run.log(
        f"PSNR of {number} decoded val images: {found.psnr:.1f} dB; latents' std {found.std:.2f}"
    )
    content = {"psnr": found.psnr, "psnr_num_images": number, "std": found.std}
    run.write_json(Path("metrics/latents.json"), {"latents": content})
    columns = min(COLUMNS, number)
    blank = encode_png(torch.full_like(found.originals[0], 255))
    rows = zip(found.originals.split(columns), found.decoded.split(columns), strict=True)
    shown: list[bytes] = []
    for row in (row for pair in rows for row in pair):
        shown += [*map(encode_png, row), *[blank] * (columns - len(row))]
    with replace_file(Path("build/figures/reconstructions.png")) as path:
        path.write_bytes(image_grid(shown, columns=columns))


if __name__ == "__main__":
    execute(Params, main, parallel=True)
