"""A feature model runs on every image shard, and its features become a cache."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from contradiff.config import parse
from contradiff.data.map_shards import Made, Processes, Tick, map_shards, missing_items
from contradiff.data.shards import Shard
from contradiff.features.batches import CleanBatch, StoredImages
from contradiff.features.cache import HEAD_NAME, MAPS, CacheIndex, ModelFolders
from contradiff.features.diffeed import NUM_PASSES
from contradiff.features.models import DiffusionFeatures, FeatureModel
from contradiff.features.params import FeaturesParams
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.files import explain_full_disk, replace_dir, replace_file, sha256_of
from contradiff.method.attention import HeadParams, TriTimestepAttention
from contradiff.method.checkpoint import Architecture, read_config
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
) -> None:
    """Compute the features of every shard that is not finished, then move all beside an index.

    Args:
        folder: the cache; an earlier one is replaced.
        work_dir: a folder that all processes share and that survives a kill.
        model: images => features, and maps, if it keeps them.
        images: all shards.
        params: how the model computes features.
        seed: of the noise.
        models: where the model comes from.
        processes: which of several this is; process 0 writes the index.
        on_progress: told how many more images are done, those of finished shards first.

    Raises:
        ValueError: a feature is not finite, which names the image; or the disk is full.
    """

    def name_of(shard: tuple[str, int]) -> str:
        return f"{shard[0]}-{shard[1]:05d}"

    def make(shard: tuple[str, int], tick: Tick) -> Made:
        path = work_dir / f"{name_of(shard)}.safetensors"
        return write_shard_features(path, model, model.read(images, *shard), params.dtype, tick)

    left = missing_items(images.shards, work_dir, name_of=name_of)
    on_progress(sum(images.num_samples(*shard) for shard in images.shards if shard not in left))
    made = map_shards(
        images.shards, make, work_dir, name_of=name_of, processes=processes, on_progress=on_progress
    )
    if processes.rank > 0:
        return
    made_with: dict[str, Any] = {"seed": seed, **params.model_dump()}
    if isinstance(model, TimmFeatures):
        fingerprint = model.fingerprint()
        if params.timm_weights is not None:
            made_with["timm_weights_sha256"] = sha256_of(models.root / params.timm_weights)
    else:
        fingerprint = models.fingerprint(params.model)
    files: dict[str, list[tuple[Shard, ...]]] = {}
    for (split, _), each in zip(images.shards, made, strict=True):
        files.setdefault(split, []).append(each.files)
    with replace_dir(folder) as temporary, explain_full_disk(folder.parent):
        head: dict[str, int] | None = None
        if isinstance(model, DiffusionFeatures) and model.keep_maps:
            config = read_config(models.checkpoint)["params"]
            shapes = parse(Architecture, config, source=str(models.checkpoint))
            head, attention = initial_attention(model, shapes.head)
            state = {name: value.cpu() for name, value in attention.state_dict().items()}
            save_file(state, temporary / HEAD_NAME)
        has_maps = head is not None
        CacheIndex(
            model=params.model,
            checkpoint=fingerprint,
            dtype=params.dtype,
            num_classes=len(images.index.info.class_ids),
            columns=model.columns,
            head=head,
            shards={split: tuple(own[0] for own in files[split]) for split in files},
            maps={split: tuple(own[1] for own in files[split]) for split in files if has_maps},
            made_with=made_with,
        ).write(temporary)
        # Last: if the disk is full by now, they are still in their place.
        for file in (file for each in made for file in each.files):
            shutil.move(work_dir / file.name, temporary / file.name)


def write_shard_features(
    path: Path, model: FeatureModel, batches: Iterable[CleanBatch], dtype: str, tick: Tick
) -> Made:
    """Write one image shard's features, and its maps, if the model gives them, to a second file."""
    keys: list[str] = []
    labels: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {}
    for batch in batches:
        keys += batch.keys
        labels.append(batch.labels)
        for name, features in model(batch).items():
            stored = to_stored(features, dtype=dtype, keys=batch.keys, name=name)
            columns.setdefault(name, []).append(stored)
        tick(len(batch.labels))
    table = {name: torch.cat(parts) for name, parts in columns.items()}
    maps = table.pop(MAPS, None)
    files = [write_table(path, table | {"labels": torch.cat(labels)}, keys=keys)]
    if maps is not None:
        files.append(write_table(path.with_suffix(f".{MAPS}.safetensors"), {MAPS: maps}, keys=[]))
    return Made(tuple(files))


def to_stored(
    features: Float[Tensor, "batch ..."], *, dtype: str, keys: Sequence[str], name: str
) -> Float[Tensor, "batch ..."]:
    """Round features to the stored type, on the CPU.

    Raises:
        ValueError: one is NaN or infinite, or becomes so; names the image.
    """
    stored = features.to("cpu", DTYPES[dtype])
    finite = stored.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        if bool(features[row].isfinite().all()):
            reason = "are too large for fp16 (65504); set features.dtype: bf16"
        else:
            reason = (
                "are not finite: the model diverged (see metrics/pretrain.csv), or bf16 did "
                "(features.precision)"
            )
        raise ValueError(f"features {name!r} of image {keys[row]} {reason}")
    return stored


def write_table(path: Path, tensors: Mapping[str, Tensor], *, keys: Sequence[str]) -> Shard:
    """Write one file, whole or not at all; its bytes depend on the content alone."""
    num_rows = len(next(iter(tensors.values())))
    with replace_file(path) as temporary:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"keys": json.dumps(list(keys))})
        return Shard(path.name, num_rows, temporary.stat().st_size, sha256_of(temporary))


def bytes_of_features(model: FeatureModel, images: StoredImages) -> int:
    """What the features of all images will take on disk: those of the first one, times all."""
    batch = next(iter(model.read(images, *images.shards[0])))
    width = sum(features[:1].numel() for features in model(batch).values())
    return (8 + 2 * width) * sum(images.num_samples(*shard) for shard in images.shards)


def initial_attention(
    features: DiffusionFeatures, head: HeadParams
) -> tuple[dict[str, int], TriTimestepAttention]:
    """What an attentive probe starts from: the trained head, or for a baseline a fresh one.

    Returns:
        The attention's arguments, and the attention.
    """
    unet = features.model.unet
    shape = {
        "in_channels": block_channels(unet, features.model.block),
        "width": head.width,
        "num_heads": head.num_heads,
        "mlp_ratio": head.mlp_ratio,
    }
    if features.params.model == "contradiff":
        return shape, features.model.attention
    if features.params.model == "diffeed":
        shape["in_channels"] = NUM_PASSES * block_channels(unet, "mid+up.1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(features.seed)
        return shape, TriTimestepAttention(**shape)
