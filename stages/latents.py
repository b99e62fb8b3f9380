"""latents: image shards => shards of VAE moments of each image's crops, in the same order."""

import shutil
from pathlib import Path

from stages._runtime import Run, execute
from contradiff.atomic import replace_dir
from contradiff.backbone import load_vae
from contradiff.config import Section
from contradiff.data.imagenet import DataParams
from contradiff.data.shards import (
    Shard,
    ShardIndex,
    ShardParams,
    image_of,
    read_shard,
    resume_shard,
    shard_name,
)
from contradiff.latents import LatentsParams, encode_samples, latent_facts

IMAGES = Path("build/shards")
BASE = Path("build/base")
EVALUATED_VIEWS = {"val": 1}
"""Splits that are only evaluated have the centre crop alone."""


class Params(Section):
    seed: int
    data: DataParams
    shard: ShardParams
    latents: LatentsParams


def main(params: Params, run: Run) -> None:
    index = ShardIndex.read(IMAGES)
    vae = load_vae(BASE).to(run.device)  # pyright: ignore[reportArgumentType]
    compression = params.shard.compression
    splits: dict[str, list[Shard]] = {}
    # Shards that an interrupted run has finished are found again and not encoded anew.
    with run.work_dir(params.model_dump(by_alias=True), [IMAGES / "index.json", BASE]) as work:
        total = sum(index.num_samples(split) for split in index.splits)
        with run.progress("encode", total) as advance:
            for split in index.splits:
                for number, shard in enumerate(index.shards(split)):
                    path = work / shard_name(split, number, compression)
                    samples = (image_of(r) for r in read_shard(IMAGES / shard.name, shard))
                    stored = encode_samples(
                        vae,
                        samples,
                        params=params.latents,
                        views=EVALUATED_VIEWS.get(split, params.latents.views),
                        image_size=params.data.image_size,
                        seed=params.seed,
                        device=run.device,
                    )
                    records = (item.to_record() for item in stored)
                    done = resume_shard(path, records, compression=compression)
                    splits.setdefault(split, []).append(done)
                    advance(shard.num_samples)
        with replace_dir(Path("build/latents")) as folder:
            for shard in (shard for shards in splits.values() for shard in shards):
                shutil.move(work / shard.name, folder / shard.name)
            facts = latent_facts(vae, params=params.latents, image_size=params.data.image_size)
            ShardIndex({k: tuple(v) for k, v in splits.items()}, facts).write(folder)


if __name__ == "__main__":
    execute(Params, main)
