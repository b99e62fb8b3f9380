"""latents: image shards => shards of VAE moments of each image's crops, in the same order.

The processes that `python -m stages.latents` starts share the shards; their number does not change
the result. After an interruption, the stage keeps the shards that are whole.
"""

from stages.runtime.run import Run, execute

from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path

from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed
from contradiff.data.encoding import LatentEncoder, encode_shard, plan_latents
from contradiff.data.latents import LatentsParams
from contradiff.data.map_shards import STATE_VERSION, map_shards, missing_items, publish_shards
from contradiff.data.params import DataParams
from contradiff.data.reconstruction import reconstruct
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex, ShardParams, read_images, read_split
from contradiff.files import replace_dir, replace_file

IMAGES = Path("build/shards")
BASE, LATENTS = Path("build/base"), Path("build/latents")
METRICS, FIGURE = Path("metrics/latents.json"), Path("build/figures/reconstructions.png")
NUM_SHOWN = 48
"""Validation images that are checked, and shown in a figure."""


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams
    latents: LatentsParams


def main(params: Params, run: Run) -> None:
    accelerator = run.accelerator()
    index = ShardIndex.read(IMAGES, ImageInfo)
    plan = plan_latents(index, compression=params.shard.compression)
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]
    encoder = LatentEncoder(vae, params.latents, params.data.image_size, params.seed, run.device)
    deciding = params.model_dump(by_alias=True)
    del deciding["latents"]["min_psnr"]  # it decides whether there are latents, not which
    images = list(islice(read_images(IMAGES, "val"), NUM_SHOWN))
    with run.work_dir(deciding, [IMAGES / "index.json", BASE], state_version=STATE_VERSION) as work:
        missing = missing_items(plan, work, name_of=attrgetter("name"))
        if run.is_main:  # before hours are spent
            run.log(encoder.describe_size(index))
            LATENTS.parent.mkdir(exist_ok=True)
            for place in (work, LATENTS.parent):
                encoder.check_room(place, missing)
            stored = encoder.encode(images, split="val")
            reconstruct(encoder, images, [item.to_record() for item in stored])
        with run.progress("encode", sum(item.images.num_samples for item in missing)) as advance:
            made = map_shards(
                plan,
                partial(
                    encode_shard,
                    encoder=encoder,
                    images=IMAGES,
                    work_dir=work,
                    compression=params.shard.compression,
                    num_workers=run.runtime.num_workers,
                ),
                work,
                name_of=attrgetter("name"),
                processes=run.processes(accelerator),
                on_progress=advance,
            )
        if run.is_main:
            with replace_dir(LATENTS) as folder:
                splits = (item.split for item in plan)
                publish_shards(folder, work, zip(splits, made, strict=True), encoder.info)
                records = islice(read_split(folder, "val"), NUM_SHOWN)
                written = reconstruct(encoder, images, records)
            number, psnr, std = len(written.decoded), written.psnr, written.std
            run.log(f"PSNR of {number} decoded val images: {psnr:.1f} dB; latents' std {std:.2f}")
            content = {"psnr": psnr, "psnr_num_images": number, "std": std}
            run.write_json(METRICS, {"latents": content})
            with replace_file(FIGURE) as path:
                path.write_bytes(written.figure())


if __name__ == "__main__":
    execute(Params, main, parallel=True)
