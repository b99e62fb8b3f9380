"""shard: raw images => WebDataset shards in seeded random order, the files' own bytes, an index."""

from stages._runtime import Run, execute

from pathlib import Path

from contradiff.atomic import replace_dir
from contradiff.config import Section, Seed
from contradiff.data.imagenet import DataParams, Manifest, read_manifest, shuffled_samples
from contradiff.data.raw import ensure_images
from contradiff.data.shards import Shard, ShardIndex, ShardParams, image_record, write_split

MANIFEST = Path("build/manifest/images.json")


class Params(Section):
    seed: Seed
    data: DataParams
    shard: ShardParams


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
        msg = (
            f"data.root: {params.data.root} has changed since {MANIFEST}; "
            "run `dvc repro -f prepare`"
        )
        raise ValueError(msg)
    splits: dict[str, tuple[Shard, ...]] = {}
    with (
        replace_dir(Path("build/shards")) as folder,
        run.progress("images", sum(map(len, manifest.splits.values()))) as advance,
    ):
        for split, files in manifest.splits.items():
            samples = shuffled_samples(read, files, seed=params.seed, split=split)
            splits[split] = write_split(
                folder,
                split,
                (image_record(sample, extension="jpg") for sample in samples),
                samples_per_shard=params.shard.samples_per_shard,
                compression=params.shard.compression,
                on_progress=advance,
            )
        facts = {
            "kind": "images",
            "seed": params.seed,
            "class_ids": list(manifest.class_ids),
            "class_names": list(manifest.class_names),
        }
        ShardIndex(splits, facts).write(folder)


if __name__ == "__main__":
    execute(Params, main)
