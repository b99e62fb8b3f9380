"""latents: image shards => shards of VAE moments of each image's crops, in the same order."""

from stages._runtime import Run, execute

import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from contradiff.atomic import replace_dir, replace_file
from contradiff.backbone import load_vae
from contradiff.config import Section, Seed
from contradiff.data.params import DataParams
from contradiff.data.png import encode_png, image_grid
from contradiff.data.shards import (
    Shard,
    ShardIndex,
    ShardParams,
    image_of,
    read_shard,
    read_split,
    resume_shard,
    shard_name,
)
from contradiff.data.transforms import apply_crop, decode
from contradiff.latents import (
    LatentsParams,
    StoredLatents,
    decode_latents,
    encode_samples,
    latent_facts,
    mode,
    psnr,
    scaling_factor,
)

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

IMAGES = Path("build/shards")
BASE, LATENTS = Path("build/base"), Path("build/latents")
NUM_SHOWN = 48
"""Validation images in the figure, in rows of 16 above their reconstructions."""
EVALUATED_VIEWS = {"val": 1}
"""Splits that are only evaluated have the centre crop alone."""


class Params(Section):
    seed: Seed
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
        with replace_dir(LATENTS) as folder:
            for shard in (shard for shards in splits.values() for shard in shards):
                shutil.move(work / shard.name, folder / shard.name)
            facts = latent_facts(vae, params=params.latents, image_size=params.data.image_size)
            ShardIndex({k: tuple(v) for k, v in splits.items()}, facts).write(folder)
    show_reconstructions(vae, run, image_size=params.data.image_size)


def show_reconstructions(vae: "AutoencoderKL", run: Run, *, image_size: int) -> None:
    """Decode stored latents: how much of an image the base's autoencoder keeps."""
    images = [image_of(record) for record in islice(read_split(IMAGES, "val"), NUM_SHOWN)]
    stored = [StoredLatents.of_record(r) for r in islice(read_split(LATENTS, "val"), NUM_SHOWN)]
    originals = torch.stack(
        [
            apply_crop(decode(image.image, name=image.key), view.crops[0], size=image_size)
            for image, view in zip(images, stored, strict=True)
        ]
    )
    moments = torch.stack([torch.from_numpy(view.moments[0]) for view in stored]).to(run.device)
    decoded = decode_latents(vae, mode(moments, scaling_factor=scaling_factor(vae))).cpu()
    quality = psnr(originals, decoded).mean().item()
    run.log(f"PSNR of {len(decoded)} decoded val images: {quality:.1f} dB")
    content = {"psnr": quality, "psnr_num_images": len(decoded)}
    run.write_json(Path("metrics/latents.json"), {"latents": content})
    above_and_below = zip(originals.split(16), decoded.split(16), strict=True)
    shown = [encode_png(image) for pair in above_and_below for row in pair for image in row]
    with replace_file(Path("build/figures/reconstructions.png")) as path:
        path.write_bytes(image_grid(shown, columns=16))


if __name__ == "__main__":
    execute(Params, main)
