"""shard: pack raw images into WebDataset shards, in seeded random order, and write an index."""

from stages.runtime.run import Run, execute

from operator import attrgetter
from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION, map_shards, missing_items
from contradiff.data.shards import ShardParams
from contradiff.files import check_free_space, replace_dir
from contradiff.sources import packing
from contradiff.sources.imagenet import reopen_images

MANIFEST, SHARDS = Path("build/manifest/images.json"), Path("build/shards")
NAME_OF = attrgetter("name")


class Params(Section):
    seed: Seed
    shard: ShardParams
    ingest: packing.IngestParams


def main(params: Params, run: Run) -> None:
    index = run.root / ".work/archives"
    images = reopen_images(MANIFEST, project=run.root, index_folder=index, on_message=run.log)
    listing = images.listing
    plan = packing.plan_shards(listing, seed=params.seed, shard=params.shard, ingest=params.ingest)
    # Finished shards stay valid if only ingest.max_quarantined changes.
    decisive = params.model_dump(by_alias=True, exclude={"ingest": {"max_quarantined"}})
    with run.work_dir(decisive, [MANIFEST], state_version=STATE_VERSION) as work:
        missing = missing_items(plan, work, name_of=NAME_OF)
        if len(missing) < len(plan):
            run.log(f"resumed: {len(plan) - len(missing)} of {len(plan)} shards are finished")
        check_free_space(work, sum(planned.num_bytes for planned in missing))
        if work.stat().st_dev != SHARDS.parent.stat().st_dev:  # another disk, for all shards
            check_free_space(SHARDS.parent, sum(planned.num_bytes for planned in plan))
        num_images = {split: len(files) for split, files in listing.splits.items()}
        maker = packing.ShardMaker(images.read, num_images, params.shard, params.ingest, work)
        with run.progress("images", sum(len(planned.files) for planned in missing)) as advance:
            made = map_shards(
                plan,
                maker,
                work,
                name_of=NAME_OF,
                num_workers=run.runtime.num_workers,
                size_of=lambda planned: len(planned.files),
                on_progress=advance,
            )
        with replace_dir(SHARDS) as folder:
            info = packing.publish(listing, made, maker, folder, seed=params.seed)
    for line in packing.describe(info):
        run.log(line)


if __name__ == "__main__":
    execute(Params, main)
