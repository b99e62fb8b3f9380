"""A feature model is run on every image shard, and its features become a cache.

`write_features` makes the files of one shard, `assemble_cache` puts all of them beside an index.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from contradiff.config import parse
from contradiff.data.map_shards import Made, Tick
from contradiff.data.shards import Shard
from contradiff.features.batches import StoredImages
from contradiff.features.cache import HEAD_NAME, MAPS, CacheIndex, weights_fingerprint
from contradiff.features.diffeed import NUM_PASSES
from contradiff.features.models import DiffusionFeatures, FeatureModel
from contradiff.features.params import FeaturesParams
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.files import explain_full_disk, replace_dir, replace_file, sha256_of
from contradiff.method.attention import HeadParams, TriTimestepAttention
from contradiff.method.checkpoint import Architecture, read_config
from contradiff.method.unet import block_channels

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


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


def shard_name(item: tuple[str, int]) -> str:
    """`train-00003`, of a split and a shard's number."""
    return f"{item[0]}-{item[1]:05d}"


def write_features(
    item: tuple[str, int],
    tick: Tick,
    *,
    model: FeatureModel,
    images: StoredImages,
    folder: Path,
    dtype: str,
) -> Made:
    """Write one image shard's features, and its maps, if the model gives them, to a second file.

    Args:
        item: split and number of the image shard.
        tick: told how many more images are done.
        model: images => features.
        images: the shards.
        folder: to write to.
        dtype: fp16 or bf16.

    Raises:
        ValueError: a feature is not finite; names the image.
    """
    keys: list[str] = []
    labels: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {}
    for batch in model.read(images, *item):
        keys += batch.keys
        labels.append(batch.labels)
        for name, features in model(batch).items():
            stored = to_stored(features, dtype=dtype, keys=batch.keys, name=name)
            columns.setdefault(name, []).append(stored)
        tick(len(batch.labels))
    table = {name: torch.cat(batches) for name, batches in columns.items()}
    maps = table.pop(MAPS, None)
    path = folder / f"{shard_name(item)}.safetensors"
    files = [write_table(path, table | {"labels": torch.cat(labels)}, keys=keys)]
    if maps is not None:
        files.append(write_table(path.with_suffix(f".{MAPS}.safetensors"), {MAPS: maps}, keys=[]))
    return Made(tuple(files))


def bytes_of_features(model: FeatureModel, images: StoredImages) -> int:
    """What the features of all images will take on disk: those of the first one, times all."""
    batch = next(iter(model.read(images, *images.shards[0])))
    width = sum(features[:1].numel() for features in model(batch).values())
    return (8 + 2 * width) * sum(images.index.num_samples(split) for split in images.index.splits)


def assemble_cache(
    folder: Path,
    work_dir: Path,
    made: Sequence[Made],
    *,
    images: StoredImages,
    model: FeatureModel,
    params: FeaturesParams,
    seed: int,
    checkpoint: Path,
    base: Path,
    root: Path,
) -> None:
    """Move the files of all shards to their place, beside an index.

    Args:
        folder: the cache; an earlier one is replaced.
        work_dir: where the files are.
        made: what `write_features` made of each of `images.shards`.
        images: the shards.
        model: that computed the features.
        params: how it did.
        seed: of the noise.
        checkpoint: the trained model's folder.
        base: the folder of its base.
        root: the folder that features.timm_weights is relative to.
    """
    made_with: dict[str, Any] = {"seed": seed, **params.model_dump()}
    if isinstance(model, TimmFeatures):
        fingerprint = model.fingerprint()
        if params.timm_weights is not None:
            made_with["timm_weights_sha256"] = sha256_of(root / params.timm_weights)
    else:
        fingerprint = weights_fingerprint(params.model, checkpoint=checkpoint, base=base)
    with replace_dir(folder) as temporary, explain_full_disk(folder.parent):
        head: dict[str, int] | None = None
        if isinstance(model, DiffusionFeatures) and model.keep_maps:
            config = parse(Architecture, read_config(checkpoint)["params"], source=str(checkpoint))
            head, attention = initial_attention(model, config.head)
            state = {name: value.cpu() for name, value in attention.state_dict().items()}
            save_file(state, temporary / HEAD_NAME)

        def files(place: int) -> dict[str, tuple[Shard, ...]]:
            """The first or second file of each shard, by split."""
            by_shard = list(zip(images.shards, made, strict=True))
            return {
                split: tuple(each.files[place] for (own, _), each in by_shard if own == split)
                for split in images.index.splits
            }

        CacheIndex(
            model=params.model,
            checkpoint=fingerprint,
            dtype=params.dtype,
            num_classes=len(images.index.info.class_ids),
            columns=model.columns,
            head=head,
            shards=files(0),
            maps={} if head is None else files(1),
            made_with=made_with,
        ).write(temporary)
        # Last: if the disk is full by now, they are still in their place.
        for file in (file for each in made for file in each.files):
            shutil.move(work_dir / file.name, temporary / file.name)


def initial_attention(
    features: DiffusionFeatures, head: HeadParams
) -> tuple[dict[str, int], TriTimestepAttention]:
    """What an attentive probe starts from: the trained head, or for a baseline a fresh one.

    Args:
        features: of the model whose maps are stored.
        head: shape of the trained head.

    Returns:
        The attention's arguments, and the attention.
    """
    unet, block = features.model.unet, features.model.block
    shape = {
        "in_channels": block_channels(unet, block),
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
