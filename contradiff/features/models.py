"""The models that give frozen features: ContraDiff, its base alone, DifFeed and timm backbones.

latents => noisy latents at three timesteps => the UNet's maps (outputs of a block) => h, or means
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contradiff.data.map_shards import Tick
from contradiff.features.batches import CleanBatch, StoredImages
from contradiff.features.cache import MAPS, ModelFolders
from contradiff.features.diffeed import feedback_maps
from contradiff.features.inversion import inverted_maps
from contradiff.features.params import FeaturesParams, FeatureSpec
from contradiff.features.timm_backbone import TimmFeatures
from contradiff.method.attention import LevelMaps
from contradiff.method.checkpoint import load_checkpoint
from contradiff.method.lora import cast_frozen_weights, disable_lora, merge_lora
from contradiff.method.model import ContraDiffModel, build_model
from contradiff.method.noise import add_noise
from contradiff.method.params import NUM_LEVELS, Architecture, MapBlock
from contradiff.types import Tokens


@dataclass(frozen=True)
class DiffusionFeatures:
    """Features of ContraDiff, of its base alone, or of its base with DifFeed's two passes.

    Noise is added to clean latents at three fixed timesteps, called a triple. An image's index
    seeds its noise. So features depend neither on the batch size nor on the number of processes.
    With `keep_maps`, a call also returns the UNet's maps at features.timesteps. `more_pools` are
    further ways to turn the maps of the UNet block head.block into features (see `pool_maps`).
    """

    model: ContraDiffModel
    params: FeaturesParams
    seed: int
    device: torch.device
    keep_maps: bool = False
    more_pools: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[FeatureSpec, ...]:
        """Features of head.block, then means of `more_blocks`; both for each triple."""
        main = "diffeed" if self.params.model == "diffeed" else self.model.block
        kinds = [(main, pool) for pool in (self.params.pool, *self.more_pools)]
        kinds += [(block, "mean") for block in self.params.more_blocks]
        return tuple(
            FeatureSpec(f"{pool}:{block}@{'-'.join(map(str, triple))}", tuple(triple), block, pool)
            for triple in self.params.triples
            for block, pool in dict.fromkeys(kinds)
        )

    def read(self, images: StoredImages, split: str, number: int) -> Iterator[CleanBatch]:
        """Yield the latents of one shard, with pixels only if the conditioner reads pixels."""
        shown = self.params.model == "contradiff" and self.params.condition == "image"
        with_pixels = shown and self.model.conditioner.input == "pixels"
        return images.latent_batches(split, number, with_pixels=with_pixels)

    def tokens(self, batch: CleanBatch) -> Tokens:
        """Encode the images or noise, as features.condition says. The base gets zeros."""
        if self.params.model != "contradiff":
            width = self.model.unet.config["cross_attention_dim"]
            return torch.zeros(len(batch.labels), 1, width, device=self.device)
        conditioner = self.model.conditioner
        shown = (
            conditioner.choose(pixels=batch.pixels, latents=batch.latents)
            if self.params.condition == "image"
            else image_noise(conditioner.shape, batch.indices, seed=self.seed + 1)
        )
        return self.model.encode_condition(shown.to(self.device))

    @torch.inference_mode()
    def __call__(self, batch: CleanBatch, shown: CleanBatch | None = None) -> dict[str, Tensor]:
        """Compute the features (batch, width) of each column, as float32 or as bfloat16.

        If `shown` is given, the images of `shown` are the conditions instead of those of `batch`.
        """
        found: dict[str, Tensor] = {}
        with autocast(self.device, self.params.precision):
            tokens = self.tokens(shown or batch)
            for triple in self.params.triples:
                maps = self._maps(batch, tokens, triple)
                if self.keep_maps:
                    found.setdefault(MAPS, next(iter(maps.values())))
                for column in (each for each in self.columns if each.triple == tuple(triple)):
                    own = maps[column.block or ""]
                    is_h = column.pool == "attention"
                    pooled = self.model.attention(own) if is_h else pool_maps(own, column.pool)
                    found[column.name] = pooled
        return found

    def _maps(
        self, batch: CleanBatch, tokens: Tokens, timesteps: Sequence[int]
    ) -> dict[str, LevelMaps]:
        """Add noise, in one step or by DDIM inversion; return maps by block, head.block's first."""
        latents = batch.latents.to(self.device)
        blocks: list[MapBlock] = list(dict.fromkeys([self.model.block, *self.params.more_blocks]))
        if self.params.noising == "ddim_chain":
            found = inverted_maps(self.model, latents, tokens, timesteps=timesteps, blocks=blocks)
            return {**found}
        shape = (NUM_LEVELS, *latents.shape[1:])
        noise = image_noise(shape, batch.indices, seed=self.seed).transpose(0, 1).to(self.device)
        if self.params.model != "diffeed":
            found = self.model.level_maps(
                latents, tokens, timesteps=timesteps, noise=noise, blocks=blocks
            )
            return {**found}
        levels = torch.tensor(sorted(timesteps, reverse=True), device=self.device)
        steps = levels.repeat_interleave(len(latents))
        repeated, alphas = latents.repeat(NUM_LEVELS, 1, 1, 1), self.model.schedule.alphas_cumprod
        noisy = add_noise(repeated, noise.flatten(0, 1), steps, alphas)
        maps = feedback_maps(self.model.unet, noisy, steps, tokens.repeat(NUM_LEVELS, 1, 1))
        return {"diffeed": maps.unflatten(0, (NUM_LEVELS, -1)).transpose(0, 1)}


def pool_maps(maps: LevelMaps, pool: str) -> Float[Tensor, "batch width"]:
    """Turn maps into features without any weights.

    mean: the average over space of each map, noisiest first | cleanest: the average of only the
    cleanest map | unpooled: all values of the cleanest map.
    """
    chosen = maps.float() if pool == "mean" else maps[:, -1:].float()
    return chosen.flatten(1) if pool == "unpooled" else chosen.mean(dim=(3, 4)).flatten(1)


def image_noise(
    shape: Sequence[int], indices: Sequence[int], *, seed: int
) -> Float[Tensor, "batch ..."]:
    """Draw Gaussian noise of the given shape for each image, seeded by `seed` and image index."""
    generators = [torch.Generator().manual_seed(seed * 10_000_019 + index) for index in indices]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return an autocast context that is active only if features.precision is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


FeatureModel: TypeAlias = DiffusionFeatures | TimmFeatures
"""`columns` describes the model's features, the main one first; `read` yields a shard's batches."""


def load_feature_model(
    params: FeaturesParams, models: ModelFolders, seed: int, device: torch.device
) -> FeatureModel:
    """Load the model that features.model names.

    The model "base" is Table 3's "SD Features": pooled maps without LoRA, with zeros as condition.
    Raises ValueError if weights are missing or do not fit the model.
    """
    if params.model == "timm":
        return TimmFeatures(params, models.root, device)
    model = load_checkpoint(models.checkpoint, base=models.base, expected=models.architecture)
    return _frozen(model, params, seed, device)


def untrained_features(
    params: FeaturesParams,
    base: Path,
    architecture: Architecture,
    *,
    image_size: int,
    more_pools: tuple[str, ...],
    seed: int,
    device: torch.device,
) -> DiffusionFeatures:
    """Build the features of ContraDiff as it is before a pretraining with this `seed`.

    The first feature is the pooled maps. In `more_pools`, "attention" adds h of the untrained head.
    LoRA and conditioner have no effect before training, so the maps are the base's.
    """
    changes = {"model": "base", "pool": "mean", "more_triples": [], "more_blocks": []}
    model = build_model(base, architecture, image_size=image_size, seed=seed).eval()
    own = _frozen(model, params.model_copy(update=changes), seed, device)
    return replace(own, more_pools=more_pools)


def _frozen(
    model: ContraDiffModel, params: FeaturesParams, seed: int, device: torch.device
) -> DiffusionFeatures:
    assert max(map(max, params.triples)) < model.schedule.num_train_timesteps, "see rules.py"
    blocks = [*params.more_blocks, *(["up.1"] if params.model == "diffeed" else [])]
    assert set(blocks) <= {"mid"} or len(model.unet.up_blocks) > 1, "see rules.py"
    if params.model != "contradiff":
        disable_lora(model.unet)
        model.self_condition = None
    if params.precision == "bf16":
        cast_frozen_weights(model.unet)  # LoRA stays apart, because bfloat16 would round its update
    elif params.model == "contradiff":
        merge_lora(model.unet)
    return DiffusionFeatures(model.to(device), params, seed, device)


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of a set of images, on the CPU, with the images' labels and keys."""

    features: Float[Tensor, "num_images width"]
    labels: Int64[Tensor, " num_images"]
    keys: tuple[str, ...]

    def __getitem__(self, rows: Int64[Tensor, " rows"]) -> "LabelledFeatures":
        """Return the features of the given rows, in that order."""
        keys = tuple(self.keys[row] for row in rows.tolist())
        return LabelledFeatures(self.features[rows], self.labels[rows], keys)

    @classmethod
    def joined(cls, sets: Sequence["LabelledFeatures"]) -> "LabelledFeatures":
        """Concatenate several sets."""
        return cls(
            torch.cat([each.features for each in sets]),
            torch.cat([each.labels for each in sets]),
            tuple(key for each in sets for key in each.keys),
        )


def compute_features(
    model: FeatureModel, batches: Iterable[CleanBatch], *, on_progress: Tick = lambda _: None
) -> LabelledFeatures:
    """Compute the model's main feature for all batches, as float32."""
    found: list[LabelledFeatures] = []
    for batch in batches:
        features = model(batch)[model.columns[0].name].float().cpu()
        found.append(LabelledFeatures(features, batch.labels, batch.keys))
        on_progress(len(batch.labels))
    return LabelledFeatures.joined(found)
