"""shard: raw images => WebDataset shards in seeded random order, the files' own bytes, an index."""

from stages.runtime.run import Run, execute

from functools import partial
from pathlib import Path
from typing import Any

from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.params import DataParams
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex, ShardParams
from contradiff.files import explain_full_disk, replace_dir
from contradiff.sources.imagenet import Manifest
from contradiff.sources.listing import Read
from contradiff.sources.packing import (
    IngestParams,
    PlannedShard,
    Recipe,
    check_space,
    find_done,
    plan_shards,
    publish,
    write_planned,
)
from contradiff.sources.pool import run_jobs
from contradiff.sources.raw import ensure_images, read_manifest
from contradiff.sources.tally import QUARANTINE_NAME, Tally

MANIFEST, SHARDS = Path("build/manifest/images.json"), Path("build/shards")


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams
    ingest: IngestParams


def main(params: Params, run: Run) -> None:
    root = ensure_images(run.resolve(params.data.root), params.data, seed=params.seed)
    manifest = Manifest.scan(
        root,
        shown_root=params.data.root,
        layout=params.data.layout,
        cache=run.root / ".work/archives",
        on_message=run.log,
    )
    read = manifest.reader(root)
    if manifest.digest != read_manifest(MANIFEST)["digest"]:
        raise ValueError(
            f"data.root: {params.data.root} has changed since {MANIFEST}; "
            "run `dvc repro -f prepare`"
        )
    plan = plan_of(params, manifest)
    recipe = Recipe(params.shard.compression, params.ingest.verify, params.ingest.resize)
    # Shards that an interrupted run has finished are found again. The threshold changes none.
    decisive = params.model_dump(by_alias=True, exclude={"ingest": {"max_quarantined"}})
    with run.work_dir(decisive, [MANIFEST], state_version=STATE_VERSION) as work:
        tally = Tally(plan, max_quarantined=params.ingest.max_quarantined)
        missing = write_missing(plan, tally, run, work=work, read=read, recipe=recipe)
        if missing < len(plan):
            run.log(f"{len(plan) - missing} of {len(plan)} shards were there already")
        described: dict[str, Any] = {
            "seed": params.seed,
            "class_names": manifest.class_names,
            **tally.facts(class_ids=manifest.class_ids),
        }
        info = ImageInfo(class_ids=manifest.class_ids, **described)
        with replace_dir(SHARDS) as folder, explain_full_disk(folder):
            splits = {split: tally.shards(split) for split in manifest.splits}
            for shards in splits.values():
                publish(shards, work=work, folder=folder)
            tally.write_quarantine(folder)
            ShardIndex(splits, info).write(folder)
    for split in manifest.splits:
        say_what_was_odd(tally, split, run)


def plan_of(params: Params, manifest: Manifest) -> list[PlannedShard]:
    megabytes = params.ingest.max_shard_megabytes
    return [
        planned
        for split, files in manifest.splits.items()
        for planned in plan_shards(
            files,
            [file.num_bytes for file in files],
            split=split,
            seed=params.seed,
            samples_per_shard=params.shard.samples_per_shard,
            max_bytes=None if megabytes is None else megabytes * 1_000_000,
            compression=params.shard.compression,
        )
    ]


def write_missing(
    plan: list[PlannedShard],
    tally: Tally,
    run: Run,
    *,
    work: Path,
    read: Read,
    recipe: Recipe,
) -> int:
    """Write what no earlier run has, in runtime.num_workers processes; return how many shards."""
    for path in work.glob(".*.part"):  # of processes that were killed
        path.unlink()
    missing: list[PlannedShard] = []
    for planned in plan:
        if done := find_done(planned, work, recipe=recipe):
            tally.add(planned, done, folder=work)
        else:
            missing.append(planned)
    SHARDS.parent.mkdir(exist_ok=True)
    check_space(plan, missing, work=work, target=SHARDS.parent)
    task = partial(write_planned, folder=work, read=read, recipe=recipe)
    workers = run.runtime.num_workers
    with run.progress("images", sum(len(planned.files) for planned in missing)) as advance:
        for planned, done in run_jobs(task, missing, num_workers=workers, on_progress=advance):
            tally.add(planned, done, folder=work)
    return len(missing)


def say_what_was_odd(tally: Tally, split: str, run: Run) -> None:
    if counts := tally.oddities(split):
        run.log(f"{split}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    if left_out := len(tally.quarantined(split)):
        run.log(f"{split}: {left_out} unreadable, left out, see {SHARDS / QUARANTINE_NAME}")


if __name__ == "__main__":
    execute(Params, main)
