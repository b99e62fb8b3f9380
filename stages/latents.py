"""latents: image shards => shards of VAE moments of each image's crops, in the same order.

The processes that `python -m stages.latents` starts share the shards; their number does not change
the result. After an interruption, the stage keeps the shards that are whole.
"""

from stages.runtime.run import Run, execute

from itertools import islice
from operator import attrgetter
from pathlib import Path

from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed
from contradiff.data import map_shards, shards
from contradiff.data.encoding import LatentEncoder, PlannedLatents, plan_latents, reconstruct
from contradiff.data.latents import LatentsParams
from contradiff.data.params import DataParams
from contradiff.data.shard_info import ImageInfo
from contradiff.files import replace_dir, replace_file

IMAGES = Path("build/shards")
BASE, LATENTS = Path("build/base"), Path("build/latents")
METRICS, FIGURE = Path("metrics/latents.json"), Path("build/figures/reconstructions.png")
NUM_SHOWN = 48
"""Validation images that are checked, and shown in a figure."""


class Params(Section):
    seed: Seed
    data: DataParams
    shard: shards.ShardParams
    latents: LatentsParams


def main(params: Params, run: Run) -> None:
    accelerator, compression = run.accelerator(), params.shard.compression
    index = shards.ShardIndex.read(IMAGES, ImageInfo)
    plan = plan_latents(index, compression=compression)
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]
    encoder = LatentEncoder(vae, params.latents, params.data.image_size, params.seed)
    deciding = params.model_dump(by_alias=True)
    del deciding["latents"]["min_psnr"]  # it decides whether there are latents, not which
    images = list(islice(shards.read_images(IMAGES, "val"), NUM_SHOWN))
    version = map_shards.STATE_VERSION
    with run.work_dir(deciding, [IMAGES / "index.json", BASE], state_version=version) as work:

        def make(planned: PlannedLatents, tick: map_shards.Tick) -> map_shards.Made:
            records = shards.read_shard(IMAGES / planned.images.name, planned.images)
            stored = encoder.encode(
                map(shards.image_of, records),
                split=planned.split,
                num_workers=run.runtime.num_workers,
            )
            records = (item.to_record() for item in stored)
            path = work / planned.name
            return map_shards.Made(
                (shards.write_shard(path, records, compression=compression, on_progress=tick),)
            )

        name_of = attrgetter("name")
        missing = map_shards.missing_items(plan, work, name_of=name_of)
        if run.is_main:  # before hours are spent
            run.log(encoder.describe_size(index))
            LATENTS.parent.mkdir(exist_ok=True)
            for place in (work, LATENTS.parent):
                encoder.check_room(place, missing)
            stored = encoder.encode(images, split="val")
            reconstruct(encoder, images, [item.to_record() for item in stored])
        processes = run.processes(accelerator)
        with run.progress("encode", sum(item.images.num_samples for item in missing)) as advance:
            made = map_shards.map_shards(
                plan, make, work, name_of=name_of, processes=processes, on_progress=advance
            )
        if run.is_main:
            with replace_dir(LATENTS) as folder:
                of_splits = zip((item.split for item in plan), made, strict=True)
                map_shards.publish_shards(folder, work, of_splits, encoder.info)
                records = islice(shards.read_split(folder, "val"), NUM_SHOWN)
                written = reconstruct(encoder, images, records)
            number, psnr, std = len(written.decoded), written.psnr, written.std
            run.log(f"PSNR of {number} decoded val images: {psnr:.1f} dB; latents' std {std:.2f}")
            content = {"psnr": psnr, "psnr_num_images": number, "std": std}
            run.write_json(METRICS, {"latents": content})
            with replace_file(FIGURE) as path:
                path.write_bytes(written.figure())


if __name__ == "__main__":
    execute(Params, main, parallel=True)
