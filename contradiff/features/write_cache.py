"""Run a feature model on all image shards, and store the features as a cache (see `cache`)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from contradiff.config import parse
from contradiff.data.map_shards import Made, Processes, Tick, map_shards, missing_items
from contradiff.data.shards import Shard
from contradiff.features.batches import StoredImages
from contradiff.features.cache import HEAD_NAME, MAPS, CacheIndex, ModelFolders
from contradiff.features.diffeed import NUM_PASSES
from contradiff.features.models import DiffusionFeatures, FeatureModel
from contradiff.features.params import FeaturesParams
from contradiff.features.spread import MAX_ROWS, check_spread
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.files import link_or_copy, replace_dir, replace_file, sha256_of
from contradiff.method.attention import TriTimestepAttention
from contradiff.method.checkpoint import read_checkpoint_card
from contradiff.method.params import Architecture
from contradiff.method.unet import block_channels

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def write_cache(
    folder: Path,
    work_dir: Path,
    model: FeatureModel,
    images: StoredImages,
    *,
    params: FeaturesParams,
    seed: int,
    models: ModelFolders,
    processes: Processes,
    on_progress: Tick,
) -> dict[str, float]:
    """Compute the features of all unfinished shards in `work_dir`; then link all files to `folder`.

    If the run is interrupted, `work_dir` keeps the finished shards. All processes share `work_dir`.
    `on_progress` first gets the number of images that were already done, then the size of each new
    batch. Process 0 returns the effective rank of each feature in the largest shard. Raises
    ValueError if a feature is not finite or is the same for all images, or if the disk is full.
    """
    name_of = "{0[0]}-{0[1]:05d}".format

    def make(shard: tuple[str, int], tick: Tick) -> Made:
        """Write one shard's features to a file. UNet maps, if any, go to a second file."""
        keys: list[str] = []
        columns: dict[str, list[Tensor]] = {}
        for batch in model.read(images, *shard):
            keys += batch.keys
            columns.setdefault("labels", []).append(batch.labels)
            for name, features in model(batch).items():
                stored = to_stored(features, dtype=params.dtype, keys=batch.keys, name=name)
                columns.setdefault(name, []).append(stored)
            tick(len(batch.labels))
        table = {name: torch.cat(parts) for name, parts in columns.items()}
        maps = {MAPS: table.pop(MAPS)} if MAPS in table else {}
        path = work_dir / f"{name_of(shard)}.safetensors"
        files = [write_table(path, table, keys=keys)]
        if maps:
            files.append(write_table(path.with_suffix(f".{MAPS}.safetensors"), maps, keys=[]))
        return Made(tuple(files))

    left = missing_items(processes.share(images.shards), work_dir, name_of=name_of)
    on_progress(sum(images.num_samples(*shard) for shard in images.shards if shard not in left))
    made = map_shards(
        images.shards, make, work_dir, name_of=name_of, processes=processes, on_progress=on_progress
    )
    if processes.rank > 0:
        return {}
    largest = max((each.files[0] for each in made), key=lambda file: file.num_samples)
    with safe_open(work_dir / largest.name, framework="pt") as table:
        ranks = {
            column.name: check_spread(
                table.get_slice(column.name)[:MAX_ROWS], name=f"features {column.name!r}"
            )
            for column in model.columns
        }
    made_with: dict[str, Any] = {"seed": seed, **params.model_dump()}
    if params.model == "timm" and params.timm_weights is not None:
        made_with["timm_weights_sha256"] = sha256_of(models.root / params.timm_weights)
    is_timm = isinstance(model, TimmFeatures)
    files: dict[str, list[tuple[Shard, ...]]] = {}
    for (split, _), each in zip(images.shards, made, strict=True):
        files.setdefault(split, []).append(each.files)
    with replace_dir(folder) as temporary:
        head, digest = None, None
        if isinstance(model, DiffusionFeatures) and model.keep_maps:
            head, attention = initial_attention(model, models.checkpoint)
            state = {name: value.cpu() for name, value in attention.state_dict().items()}
            save_file(state, temporary / HEAD_NAME)
            digest = sha256_of(temporary / HEAD_NAME)
        CacheIndex(
            model=params.model,
            checkpoint=model.fingerprint() if is_timm else models.fingerprint(params.model),
            dtype=params.dtype,
            num_classes=len(images.index.info.class_ids),
            columns=model.columns,
            head=head,
            head_sha256=digest,
            shards={split: tuple(own[0] for own in files[split]) for split in files},
            maps={split: tuple(own[1] for own in files[split]) for split in files if head},
            made_with=made_with,
        ).write(temporary)
        for file in (file for each in made for file in each.files):
            link_or_copy(work_dir / file.name, temporary / file.name)
    return ranks


def to_stored(
    features: Float[Tensor, "batch ..."], *, dtype: str, keys: Sequence[str], name: str
) -> Float[Tensor, "batch ..."]:
    """Convert features to the stored type, on the CPU. Raises ValueError if one is not finite."""
    stored = features.to("cpu", DTYPES[dtype])
    finite = stored.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        reason = (
            "are too large for fp16 (above 65504); set features.dtype: bf16"
            if bool(features[row].isfinite().all())
            else "are not finite: the training diverged (see metrics/pretrain.csv), or bf16 is too "
            "coarse (then set features.precision: fp32)"
        )
        raise ValueError(f"features {name!r} of image {keys[row]} {reason}")
    return stored


def write_table(path: Path, tensors: Mapping[str, Tensor], *, keys: Sequence[str]) -> Shard:
    """Write one file atomically. The same tensors and keys always give the same bytes."""
    num_rows = len(next(iter(tensors.values())))
    with replace_file(path) as temporary:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"keys": json.dumps(list(keys))})
        return Shard(path.name, num_rows, temporary.stat().st_size, sha256_of(temporary))


def bytes_of_features(model: FeatureModel, images: StoredImages) -> int:
    """Compute how many bytes the features of all images take."""
    batch = next(iter(model.read(images, *images.shards[0])))
    width = sum(features[:1].numel() for features in model(batch).values())
    return (8 + 2 * width) * sum(images.num_samples(*shard) for shard in images.shards)


def initial_attention(
    features: DiffusionFeatures, checkpoint: Path
) -> tuple[dict[str, Any], TriTimestepAttention]:
    """Return the constructor arguments and the attention head with which attentive probes start.

    ContraDiff has a trained head. For baselines, the features' seed draws a new head.
    """
    unet, kind = features.model.unet, features.params.model
    trained = read_checkpoint_card(checkpoint).params
    shapes = parse(Architecture, trained, source=str(checkpoint))
    shape: dict[str, Any] = {"in_channels": block_channels(unet, features.model.block)}
    shape |= shapes.head.attention_arguments
    if kind == "contradiff":
        return shape, features.model.attention
    if kind == "diffeed":
        shape["in_channels"] = NUM_PASSES * block_channels(unet, "mid+up.1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(features.seed)
        return shape, TriTimestepAttention(**shape)
