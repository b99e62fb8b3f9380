"""baselines: test features that need no pretraining, for comparison with the model's feature h.

The tested features are the base's UNet maps, and h of the model before training. The result does
not depend on the sections `loss` and `pretrain`: if only these change, DVC skips this stage.
"""

from stages.runtime.run import Run, execute

from pathlib import Path

from contradiff.config import Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.shard_info import LatentInfo
from contradiff.data.shards import ShardIndex
from contradiff.downstream.params import ProbeParams
from contradiff.downstream.probe_grid import score_columns
from contradiff.features.batches import StoredImages
from contradiff.features.cache import FeatureCache, ModelFolders
from contradiff.features.models import untrained_features
from contradiff.features.params import FeaturesParams
from contradiff.features.write_cache import bytes_of_features, write_cache
from contradiff.files import check_free_space
from contradiff.method.params import Architecture

BASE, IMAGES, LATENTS = Path("build/base"), Path("build/shards"), Path("build/latents")
ROWS = {
    "mean": "base_pooled",
    "cleanest": "base_cleanest",
    "attention": "untrained_head",
    "unpooled": "base_cleanest_unpooled",
}
"""Kind of pooling => name of the row in metrics/baselines.json."""


class Params(Architecture):
    seed: Seed
    features: FeaturesParams
    probe: ProbeParams


def main(params: Params, run: Run) -> None:
    settings, seed, processes = params.probe, params.seed, run.processes(run.accelerator())
    images = StoredImages(IMAGES, LATENTS, params.features.batch_size, run.runtime.num_workers)
    rows: dict[str, object] = {"chance": {"top1": 1 / len(images.index.info.class_ids)}}
    if settings.baselines != "none":
        model = untrained_features(
            params.features,
            BASE,
            params,
            image_size=ShardIndex.read(LATENTS, LatentInfo).info.image_size,
            more_pools=tuple(ROWS)[1:] if settings.baselines == "all" else tuple(ROWS)[1:3],
            seed=seed,
            device=run.device,
        )
        inputs = [BASE, IMAGES / "index.json", LATENTS / "index.json"]
        models = ModelFolders(BASE, BASE, run.root)  # no checkpoint is read
        with run.work_dir(params, inputs, state_version=STATE_VERSION) as folder:
            if run.is_main:
                num_bytes = bytes_of_features(model, images)
                num_bytes -= sum(file.stat().st_size for file in folder.iterdir())
                ways_out = 'set probe.baselines to "pooled" or "none"'
                check_free_space(folder, num_bytes, ways_out=ways_out)
            num_images = sum(images.num_samples(*shard) for shard in images.shards)
            with run.progress("features", num_images) as advance:
                write_cache(
                    folder / "features",
                    folder,
                    model,
                    images,
                    params=model.params,
                    seed=seed,
                    models=models,
                    processes=processes,
                    on_progress=advance,
                )
            if not run.is_main:
                return
            cache = FeatureCache.open(folder / "features", models)
            with run.progress("classify", len(model.columns), "feature") as advance:
                scores = score_columns(cache, settings, seed, run.device, advance)
        rows |= {ROWS[pool]: found for pool, found in scores.items()}
        run.log(", ".join(f"{ROWS[pool]} {row['top1']:.1%}" for pool, row in scores.items()))
    protocol = "logistic" if settings.cs else "sgd"
    metrics = {"rows": rows, "protocol": protocol, "split": settings.split}
    run.write_json(Path("metrics/baselines.json"), {"baselines": metrics})


if __name__ == "__main__":
    execute(Params, main, parallel=True)
