"""features: compute the features of every image, and store them in shards for the stage `probe`.

Several processes can share the work. After an interruption, the next run keeps finished shards.
"""

from stages.runtime.run import Run, execute

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from contradiff.config import Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.features.batches import StoredImages
from contradiff.features.cache import ModelFolders
from contradiff.features.models import DiffusionFeatures, load_feature_model
from contradiff.features.params import FeaturesParams
from contradiff.features.write_cache import bytes_of_features, write_cache
from contradiff.files import bytes_of, check_free_space, describe_bytes
from contradiff.method.compilation import compile_blocks
from contradiff.method.params import Architecture

BASE, PRETRAIN = Path("build/base"), Path("build/pretrain")
IMAGES, LATENTS, FEATURES = Path("build/shards"), Path("build/latents"), Path("build/features")

MIN_RANK = 1.5
"""Features with a lower effective rank are called collapsed."""


class Params(Architecture):
    seed: Seed
    features: FeaturesParams
    probe_head: Literal["linear", "attentive"] = Field(
        alias="probe.head", description="attentive: also store the UNet's maps"
    )


def main(params: Params, run: Run) -> None:
    settings, seed, processes = params.features, params.seed, run.processes(run.accelerator())
    models = ModelFolders(PRETRAIN, BASE, run.root, params)
    model = load_feature_model(settings, models, seed, run.device)
    if isinstance(model, DiffusionFeatures):
        model = replace(model, keep_maps=params.probe_head == "attentive")
        if run.runtime.compile == "all":
            compile_blocks(model.model.unet)
    images = StoredImages(IMAGES, LATENTS, settings.batch_size, run.runtime.num_workers)
    inputs = [BASE, PRETRAIN, IMAGES / "index.json", LATENTS / "index.json"]
    if settings.model == "timm" and settings.timm_weights is not None:
        inputs.append(run.resolve(settings.timm_weights))
    with run.work_dir(params, inputs, state_version=STATE_VERSION) as folder:
        if run.is_main:  # the other processes write only after this check
            num_bytes = bytes_of_features(model, images)
            run.log(f"the features need {describe_bytes(num_bytes)} of disk space")
            ways_out = (
                'set probe.head to "linear", which stores no maps, or shorten the list '
                "features.more_triples or features.more_blocks"
            )
            num_bytes -= bytes_of(folder, "*")
            check_free_space(folder, num_bytes, ways_out=ways_out)
        num_images = sum(images.num_samples(*shard) for shard in images.shards)
        with run.progress("features", num_images) as advance:
            options: dict[str, Any] = {"params": settings, "seed": seed, "models": models}
            options |= {"processes": processes, "on_progress": advance}
            ranks = write_cache(FEATURES, folder, model, images, **options)
    shown = ", ".join(f"{name} {rank:.1f}" for name, rank in ranks.items())
    run.log(f"stored features, with their effective ranks: {shown}")
    if collapsed := [name for name, rank in ranks.items() if rank < MIN_RANK]:
        fault = f"an effective rank below {MIN_RANK:g}: their images differ along one line only"
        run.log(f"warning: the features {', '.join(collapsed)} have collapsed to {fault}")


if __name__ == "__main__":
    execute(Params, main, parallel=True, has_parts=True)
