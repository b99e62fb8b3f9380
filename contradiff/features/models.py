"""The diffusion models whose features are cached: ContraDiff, its base alone, DifFeed's way."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from contradiff.config import parse
from contradiff.data.shards import Shard
from contradiff.data.streams import PairedShards
from contradiff.features.cache import MAPS, Column, to_stored, write_rows
from contradiff.features.diffeed import NUM_FUSED, feedback_maps
from contradiff.features.extraction import (
    CleanBatch,
    FeatureData,
    autocast,
    block_maps_of,
    check_timesteps,
    level_noise,
    shard_batches,
    tokens_of,
)
from contradiff.features.params import FeaturesParams
from contradiff.method.attention import HeadParams, LevelMaps, TriTimestepAttention
from contradiff.method.checkpoint import Architecture, load_checkpoint, read_config
from contradiff.method.lora import cast_frozen_weights, disable_lora
from contradiff.method.model import ContraDiff
from contradiff.method.noise import NUM_LEVELS, add_noise
from contradiff.method.unet import MapBlock, block_channels


@runtime_checkable
class FeatureModel(Protocol):
    """Images to columns: what the cache is filled by.

    Attributes:
        columns: what a call returns, the main one first.
    """

    @property
    def columns(self) -> tuple[Column, ...]:
        """Main column first."""
        ...

    def read(self, data: FeatureData, split: str, number: int) -> Iterator[CleanBatch]:
        """The batches of one image shard, with what the model needs of them."""
        ...

    def __call__(self, batch: CleanBatch) -> Mapping[str, Tensor]:
        """Features (batch, width) by column, and "maps" where maps are kept."""
        ...


@dataclass(frozen=True)
class DiffusionFeatures:
    """Features of ContraDiff, or of its base: see `load_diffusion_features`."""

    model: ContraDiff
    head: HeadParams
    params: FeaturesParams
    keep_maps: bool
    seed: int
    device: torch.device

    def read(self, data: FeatureData, split: str, number: int) -> Iterator[CleanBatch]:
        """Latents of one image shard, and pixels if the conditioner sees them."""
        return shard_batches(
            PairedShards.open(data.images, data.latents, split=split),
            number,
            batch_size=data.batch_size,
            with_pixels=self.needs_pixels,
            num_threads=data.num_threads,
        )

    @property
    def needs_pixels(self) -> bool:
        """Only for a conditioner that sees the image."""
        shown = self.params.model == "contradiff" and self.params.condition == "image"
        return shown and self.model.conditioner.input == "pixels"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of each triple the configured pooling of the model's block, then the further blocks."""
        main = "diffeed" if self.params.model == "diffeed" else self.model.block
        kinds = [(main, self.params.pool), *((block, "mean") for block in self.params.more_blocks)]
        kinds = list(dict.fromkeys(kinds))
        return tuple(
            Column(column_name(triple, block, pool), tuple(triple), block, pool)
            for triple in self.params.triples
            for block, pool in kinds
        )

    def initial_attention(self) -> TriTimestepAttention:
        """What an attentive probe starts from: the trained head, or for a baseline a fresh one."""
        if self.params.model == "contradiff":
            return self.model.attention
        channels = block_channels(self.model.unet, self.model.block)
        if self.params.model == "diffeed":
            channels = NUM_FUSED // 2 * block_channels(self.model.unet, "mid+up.1")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return TriTimestepAttention(**attention_shape(self.head, in_channels=channels))

    @torch.inference_mode()
    def __call__(self, batch: CleanBatch) -> dict[str, Tensor]:
        """Features of a batch, float32 or the autocast's type, on `device`."""
        found: dict[str, Tensor] = {}
        with autocast(self.device, self.params.precision):
            tokens = tokens_of(
                self.model, batch, params=self.params, seed=self.seed, device=self.device
            )
            for number, triple in enumerate(self.params.triples):
                maps = self._maps(batch, tokens, triple)
                for column in self.columns:
                    if column.triple == tuple(triple):
                        assert column.block is not None
                        found[column.name] = self._pooled(maps[column.block], column.pool)
                if number == 0 and self.keep_maps:
                    found[MAPS] = next(iter(maps.values()))
        return found

    def _maps(self, batch: CleanBatch, tokens: Tensor, triple: list[int]) -> dict[str, Tensor]:
        """By block, the main one first."""
        if self.params.model == "diffeed":
            return {"diffeed": self._feedback_maps(batch, tokens, triple)}
        blocks: list[MapBlock] = list(dict.fromkeys([self.model.block, *self.params.more_blocks]))
        found = block_maps_of(
            self.model,
            batch,
            tokens,
            timesteps=triple,
            noising=self.params.noising,
            blocks=blocks,
            seed=self.seed,
            device=self.device,
        )
        return {str(block): maps for block, maps in found.items()}

    def _feedback_maps(self, batch: CleanBatch, tokens: Tensor, triple: list[int]) -> LevelMaps:
        schedule = self.model.schedule
        check_timesteps(triple, num_train_timesteps=schedule.num_train_timesteps)
        latents = batch.latents.to(self.device)
        noise = level_noise(batch, seed=self.seed).to(self.device)
        levels = torch.tensor(sorted(triple, reverse=True), device=self.device)
        steps = levels.repeat_interleave(len(latents))
        noisy = add_noise(
            latents.repeat(NUM_LEVELS, 1, 1, 1), noise.flatten(0, 1), steps, schedule.alphas_cumprod
        )
        maps = feedback_maps(self.model.unet, noisy, steps, tokens.repeat(NUM_LEVELS, 1, 1))
        return maps.unflatten(0, (NUM_LEVELS, -1)).transpose(0, 1)

    def _pooled(self, maps: Tensor, pool: str) -> Tensor:
        return self.model.attention(maps) if pool == "attention" else pooled_mean(maps)


def pooled_mean(maps: LevelMaps) -> Tensor:
    """The three maps averaged over space, side by side: (batch, 3 x channels), float32."""
    return maps.float().mean(dim=(3, 4)).flatten(1)


def column_name(triple: list[int], block: str, pool: str) -> str:
    """Such as "attention:mid@401-201-101"."""
    return f"{pool}:{block}@{'-'.join(map(str, triple))}"


def load_diffusion_features(
    params: FeaturesParams,
    *,
    checkpoint: Path,
    base: Path,
    keep_maps: bool,
    seed: int,
    device: torch.device,
) -> DiffusionFeatures:
    """Load the trained model; of the baselines the base's own function alone is left.

    `base` is Table 3's "SD Features": LoRA off, all-zero tokens, pooled bottlenecks. The zero
    tokens stand in the place of CLIP's empty prompt, which the method does not use.

    Raises:
        ValueError: the checkpoint is missing or of another base, or the base lacks a block.
    """
    model = load_checkpoint(checkpoint, base=base)
    if params.model != "contradiff":
        disable_lora(model.unet)
        model.self_condition = None
    if params.precision == "bf16":
        cast_frozen_weights(model.unet)
    needed: list[MapBlock] = [*params.more_blocks, *(["up.1"] if params.model == "diffeed" else [])]
    for block in needed:
        try:
            block_channels(model.unet, block)
        except ValueError:
            key = "features.more_blocks" if params.more_blocks else "features.model: diffeed"
            raise ValueError(f"{key}: the base's UNet has no second up block") from None
    shapes = parse(Architecture, read_config(checkpoint)["params"], source=str(checkpoint))
    return DiffusionFeatures(model.to(device), shapes.head, params, keep_maps, seed, device)


def attention_shape(head: HeadParams, *, in_channels: int) -> dict[str, int]:
    """Arguments of a TriTimestepAttention over so many channels."""
    return {
        "in_channels": in_channels,
        "width": head.width,
        "num_heads": head.num_heads,
        "mlp_ratio": head.mlp_ratio,
    }


def write_features(
    path: Path, model: FeatureModel, batches: Iterable[CleanBatch], *, dtype: str
) -> list[Shard]:
    """Write one image shard's features, and its maps, if the model keeps them, to a second file.

    Raises:
        ValueError: a feature is not finite; names the image.
    """
    keys: list[str] = []
    labels: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        keys += batch.keys
        labels.append(batch.labels)
        for name, features in model(batch).items():
            stored = to_stored(features, dtype=dtype, keys=batch.keys, name=name)
            parts.setdefault(name, []).append(stored)
    maps = parts.pop(MAPS, None)
    found = {name: torch.cat(part) for name, part in parts.items()} | {"labels": torch.cat(labels)}
    shards = [write_rows(path, found, keys=keys)]
    if maps is not None:
        file = path.with_suffix(f".{MAPS}.safetensors")
        shards.append(write_rows(file, {MAPS: torch.cat(maps)}, keys=[]))
    return shards


def bytes_of_image(model: FeatureModel, batch: CleanBatch) -> int:
    """What the features of one image take on disk, found by computing those of a batch's first."""
    one = CleanBatch(
        batch.indices[:1], batch.latents[:1], batch.pixels[:1], batch.labels[:1], batch.keys[:1]
    )
    return 8 + 2 * sum(features.numel() for features in model(one).values())
