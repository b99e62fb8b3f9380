"""features: frozen features of every image, once, as shards that the probe reads.

Runs on as many processes as `python -m stages.features` starts. Each takes every
n-th shard; the result does not depend on their number. Interrupted, it goes on where it was.
"""

from stages.runtime.run import Run, execute

import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import save_file

from contradiff.config import Section, Seed
from contradiff.data.map_shards import STATE_VERSION
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import Shard, ShardIndex
from contradiff.features.cache import (
    HEAD_NAME,
    CacheIndex,
    checkpoint_fingerprint,
    finished_rows,
    resume_rows,
)
from contradiff.features.choice import load_feature_model
from contradiff.features.extraction import FeatureData
from contradiff.features.models import (
    DiffusionFeatures,
    FeatureModel,
    attention_shape,
    bytes_of_image,
    write_features,
)
from contradiff.features.params import FeaturesParams
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.files import (
    check_free_space,
    describe_bytes,
    explain_full_disk,
    replace_dir,
    sha256_of,
)
from contradiff.method.checkpoint import base_digest

BASE, PRETRAIN = Path("build/base"), Path("build/pretrain")
IMAGES, LATENTS, FEATURES = Path("build/shards"), Path("build/latents"), Path("build/features")


class Params(Section):
    seed: Seed
    features: FeaturesParams
    head: Literal["linear", "attentive"] = Field(
        alias="probe.head", description="attentive: the maps of the main triple are stored too"
    )


def main(params: Params, run: Run) -> None:
    accelerator = run.accelerator()
    model = load_feature_model(
        params.features,
        checkpoint=PRETRAIN,
        base=BASE,
        keep_maps=params.head == "attentive",
        seed=params.seed,
        device=run.device,
        root=run.root,
    )
    index = ShardIndex.read(IMAGES, ImageInfo)
    data = FeatureData(IMAGES, LATENTS, params.features.batch_size, run.runtime.num_workers)
    shards = [(split, i) for split in index.splits for i in range(len(index.shards(split)))]
    own = shards[accelerator.process_index :: accelerator.num_processes]
    inputs = [BASE, PRETRAIN, IMAGES / "index.json", LATENTS / "index.json"]
    if params.features.model == "timm" and params.features.timm_weights is not None:
        inputs.append(run.resolve(params.features.timm_weights))
    with run.work_dir(params, inputs, state_version=STATE_VERSION) as folder:
        accelerator.wait_for_everyone()  # the main process holds the folder's lock
        first = next(iter(model.read(data, *shards[0])))
        num_images = sum(index.num_samples(split) for split in index.splits)
        num_bytes = bytes_of_image(model, first) * num_images
        run.log(f"{describe_bytes(num_bytes)} of features")
        check_free_space(
            folder,
            num_bytes - sum(file.stat().st_size for file in folder.iterdir()),
            ways_out="store less: probe.head: linear (no maps), fewer features.more_triples or "
            "features.more_blocks",
        )
        # nobody writes before everybody has measured what is free
        accelerator.wait_for_everyone()
        num_own = sum(index.shards(split)[number].num_samples for split, number in own)
        with explain_full_disk(folder), run.progress("features", num_own) as advance:
            for split, number in own:
                path = file_of(folder, split, number)
                # lazily: nothing is read of a shard that is finished
                batches = model.read(data, split, number)
                make = partial(write_features, path, model, batches, dtype=params.features.dtype)
                resume_rows(path, make)
                advance(index.shards(split)[number].num_samples)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            collect(folder, params=params, model=model, index=index, run=run)
        accelerator.wait_for_everyone()


def file_of(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def collect(
    folder: Path, *, params: Params, model: FeatureModel, index: ShardIndex[ImageInfo], run: Run
) -> None:
    """Move the shards of all processes to their place, and write the index."""
    files: dict[str, list[list[Shard]]] = {}
    for split in index.splits:
        paths = [file_of(folder, split, number) for number in range(len(index.shards(split)))]
        files[split] = [finished_rows(path) or [] for path in paths]
        assert all(files[split]), "every process has finished its shards"
    facts: dict[str, Any] = {"seed": params.seed, **params.features.model_dump()}
    if facts["timm_weights"] is not None and params.features.model == "timm":
        facts["timm_weights_sha256"] = sha256_of(run.resolve(facts["timm_weights"]))
    with replace_dir(FEATURES) as made, explain_full_disk(FEATURES.parent):
        shape: dict[str, int] | None = None
        if params.head == "attentive" and isinstance(model, DiffusionFeatures):
            attention = model.initial_attention()
            shape = attention_shape(model.head, in_channels=attention.norm_in.normalized_shape[0])
            state = {name: value.cpu() for name, value in attention.state_dict().items()}
            save_file(state, made / HEAD_NAME)
        CacheIndex(
            model=params.features.model,
            checkpoint=fingerprint_of(model, params),
            dtype=params.features.dtype,
            num_classes=len(index.info.class_ids),
            columns=model.columns,
            head=shape,
            shards={split: tuple(pair[0] for pair in pairs) for split, pairs in files.items()},
            maps={
                split: tuple(pair[1] for pair in pairs)
                for split, pairs in files.items()
                if params.head == "attentive"
            },
            facts=facts,
        ).write(made)
        # last: if the disk is full by now, they are still in their place
        for shard in (shard for split in files.values() for pair in split for shard in pair):
            shutil.move(folder / shard.name, made / shard.name)
    run.log(f"{len(model.columns)} columns: {', '.join(column.name for column in model.columns)}")


def fingerprint_of(model: FeatureModel, params: Params) -> str:
    """Of the weights that the features come from: baselines do not change with the training."""
    if isinstance(model, TimmFeatures):
        return model.fingerprint()
    if params.features.model == "contradiff":
        return checkpoint_fingerprint(PRETRAIN)
    return base_digest(BASE)


if __name__ == "__main__":
    execute(Params, main, parallel=True)
