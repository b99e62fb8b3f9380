"""latents: encode each image's crops with the VAE; store the mean and log-variance of each latent.

Image shards and latent shards have the same order. Several processes can share the work. After an
interruption, the next run keeps finished shards.
"""

from stages.runtime.run import Run, execute

from itertools import islice
from pathlib import Path

from contradiff.base.loading import load_vae
from contradiff.config import Section, Seed
from contradiff.data import map_shards, shards
from contradiff.data.encoding import LatentEncoder, reconstruct
from contradiff.data.params import DataParams, LatentsParams
from contradiff.data.png import paired_grid
from contradiff.data.shard_info import ImageInfo
from contradiff.files import check_free_space, replace_dir, replace_file

IMAGES = Path("build/shards")
BASE, LATENTS = Path("build/base"), Path("build/latents")
METRICS, FIGURE = Path("metrics/latents.json"), Path("build/figures/reconstructions.png")
NUM_SHOWN = 48
"""Number of validation images whose reconstructions are checked and shown in a figure."""


class Params(Section):
    seed: Seed
    data: DataParams
    shard: shards.ShardParams
    latents: LatentsParams


def main(params: Params, run: Run) -> None:
    processes, kind = run.processes(run.accelerator()), params.shard.compression
    index = shards.ShardIndex.read(IMAGES, ImageInfo)
    plan = {
        shards.shard_name(split, number, kind): (split, shard)
        for split, listed in index.splits.items()
        for number, shard in enumerate(listed)
    }
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]
    encoder = LatentEncoder(vae, params.latents, params.data.image_size, params.seed)
    deciding = params.model_dump(by_alias=True)
    del deciding["latents"]["min_psnr"]  # the latents do not depend on it
    shown = list(islice(shards.read_images(IMAGES, "val"), NUM_SHOWN))
    version = map_shards.STATE_VERSION
    with run.work_dir(deciding, [IMAGES / "index.json", BASE], state_version=version) as work:

        def make(name: str, tick: map_shards.Tick) -> map_shards.Made:
            split, shard = plan[name]
            images = map(shards.image_of, shards.read_shard(IMAGES / shard.name, shard))
            stored = encoder.encode(images, split=split, num_workers=run.runtime.num_workers)
            records = (item.to_record() for item in stored)
            written = shards.write_shard(work / name, records, compression=kind, on_progress=tick)
            return map_shards.Made((written,))

        own = processes.share(list(plan))
        missing = [plan[name] for name in map_shards.missing_items(own, work, name_of=str)]
        if run.is_main:  # check disk space and quality before the long work
            run.log(encoder.describe_size(index))
            LATENTS.parent.mkdir(exist_ok=True)
            size = sum(encoder.shard_bytes(split, shard.num_samples) for split, shard in missing)
            ways_out = "lower latents.views, or set latents.flips to false"
            for place in (work, LATENTS.parent):
                check_free_space(place, size, ways_out=ways_out)
            stored = encoder.encode(shown, split="val")
            reconstruct(encoder, shown, [item.to_record() for item in stored])
        with run.progress("encode", sum(shard.num_samples for _, shard in missing)) as advance:
            made = map_shards.map_shards(
                list(plan), make, work, name_of=str, processes=processes, on_progress=advance
            )
        if run.is_main:
            with replace_dir(LATENTS) as folder:
                of_splits = zip((split for split, _ in plan.values()), made, strict=True)
                map_shards.publish_shards(folder, work, of_splits, encoder.info)
                records = islice(shards.read_split(folder, "val"), NUM_SHOWN)
                written = reconstruct(encoder, shown, records)
            number, psnr, std = len(written.decoded), written.psnr, written.std
            run.log(f"PSNR of {number} decoded val images {psnr:.1f} dB, std of latents {std:.2f}")
            content = {"psnr": psnr, "psnr_num_images": number, "std": std}
            run.write_json(METRICS, {"latents": content})
            with replace_file(FIGURE) as path:
                columns = min(16, number)
                path.write_bytes(paired_grid(written.originals, written.decoded, columns=columns))


if __name__ == "__main__":
    execute(Params, main, parallel=True, without_gpu=lambda _: 2, has_parts=True)
