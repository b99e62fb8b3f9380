"""conditions: copy validation images and their latents, as conditions for the stage `generate`.

The stage `generate` then needs neither build/shards nor build/latents. If generate.condition is not
"image", this stage copies no images.
"""

from stages.runtime.run import Run, execute

from pathlib import Path

from contradiff.config import Section
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex, ShardParams
from contradiff.features.batches import stored_batches
from contradiff.files import replace_dir
from contradiff.generation.condition_images import write_conditions
from contradiff.generation.sampling import GenerateParams

IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
CONDITIONS = Path("build/conditions")


class Params(Section):
    shard: ShardParams
    generate: GenerateParams


def main(params: Params, run: Run) -> None:
    section = params.generate
    wanted = section.num_samples if section.condition == "image" else 0
    count = min(wanted, ShardIndex.read(IMAGES, ImageInfo).num_samples("val"))
    batches = stored_batches(IMAGES, LATENTS, split="val", batch_size=section.batch_size)
    with replace_dir(CONDITIONS) as folder, run.progress("store", count) as advance:
        write_conditions(
            folder, batches, num_images=count, params=params.shard, on_progress=advance
        )


if __name__ == "__main__":
    execute(Params, main)
