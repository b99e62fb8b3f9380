"""conditions: copy validation images and their latents, as conditions for the stage `generate`.

The stage `generate` then needs neither build/shards nor build/latents. If generate.condition is not
"image", this stage copies no images.
"""

from stages.runtime.run import Run, execute

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from contradiff.config import Section
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import Record, ShardIndex, ShardParams
from contradiff.files import replace_dir
from contradiff.generation.condition_shards import write_conditions
from contradiff.generation.params import GenerateParams
from contradiff.imports import slow_import

IMAGES, LATENTS = Path("build/shards"), Path("build/latents")
CONDITIONS = Path("build/conditions")


class Params(Section):
    shard: ShardParams
    generate: GenerateParams


def main(params: Params, run: Run) -> None:
    section = params.generate
    wanted = section.num_samples if section.condition == "image" else 0
    count = min(wanted, ShardIndex.read(IMAGES, ImageInfo).num_samples("val"))
    records = read_images(count, batch_size=section.batch_size) if count else ()
    with replace_dir(CONDITIONS) as folder, run.progress("store", count) as advance:
        write_conditions(folder, records, params=params.shard, on_progress=advance)


def read_images(count: int, *, batch_size: int) -> Iterator[Record]:
    """Return records of the first validation images and their latents. Only this needs torch."""
    with slow_import():
        from contradiff.features.batches import stored_batches
        from contradiff.generation.condition_images import condition_records

    batches = stored_batches(IMAGES, LATENTS, split="val", batch_size=batch_size)
    return islice(condition_records(batches), count)


if __name__ == "__main__":
    execute(Params, main)
