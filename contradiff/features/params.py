"""Section `features`, and what each feature that it asks for is."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Section
from contradiff.method.noise import NUM_LEVELS
from contradiff.method.unet import MapBlock
from contradiff.types import Precision


@dataclass(frozen=True)
class FeatureSpec:
    """One feature of an image: a block's maps at three noise levels, pooled; timm has neither."""

    name: str
    triple: tuple[int, ...] | None
    block: str | None
    pool: str


class FeaturesParams(Section):
    """Section `features`: which frozen features are taken for evaluation, and how they are kept."""

    model: Literal["contradiff", "base", "diffeed", "timm"] = Field(
        description="contradiff: the trained model | base: its base alone, no LoRA and zero tokens "
        "(Table 3's SD Features) | diffeed: the base in two passes with feedback | timm: a backbone"
    )
    timm_name: str | None = Field(description="timm: the architecture, as timm.create_model's")
    timm_weights: str | None = Field(description="timm: a local .safetensors file of its weights")
    timm_pretrained: bool = Field(description="timm: fetch its weights from the hub (network)")
    timesteps: list[int] = Field(description="the fixed evaluation triple")
    more_triples: list[list[int]] = Field(description="further triples, for the probe's grid")
    more_blocks: list[MapBlock] = Field(
        description="further features for the probe's grid: means of these blocks, each triple"
    )
    noising: Literal["direct", "ddim_chain"] = Field(
        description="direct: in one step (Eq. 5) | ddim_chain: DDIM inversion on a grid of 20 steps"
    )
    condition: Literal["image", "noise"] = Field(
        description="what contradiff's conditioner sees; the base alone has zero tokens"
    )
    pool: Literal["attention", "mean"] = Field(
        description="attention: h of Eq. 4 | mean: the maps averaged over space (SD Features); "
        "timm: the backbone's own pooled feature"
    )
    dtype: Literal["fp16", "bf16"] = Field(description="of the stored features")
    precision: Precision = Field(description="of the computation; bf16 by autocast")
    batch_size: int = Field(ge=1)

    @property
    def triples(self) -> list[list[int]]:
        """The evaluation triple, then the further ones."""
        return [self.timesteps, *self.more_triples]

    @model_validator(mode="after")
    def _distinct(self) -> "FeaturesParams":
        for number, triple in enumerate(self.triples):
            if len(triple) != NUM_LEVELS or len(set(triple)) < NUM_LEVELS or min(triple) < 0:
                key = "features.more_triples" if number else "features.timesteps"
                raise ValueError(f"{key}: {triple} are not three distinct timesteps >= 0")
        if len(set(map(frozenset, self.triples))) < len(self.triples):
            key = "features.more_triples"
            raise ValueError(f"{key}: a triple is repeated (features.timesteps counts too)")
        if len(set(self.more_blocks)) < len(self.more_blocks):
            raise ValueError(f"features.more_blocks: {self.more_blocks} repeats a block")
        return self

    @model_validator(mode="after")
    def _baselines_have_their_own_shape(self) -> "FeaturesParams":
        is_timm, model = self.model == "timm", f"features.model: {self.model}"
        if self.model != "contradiff" and self.pool == "attention":
            raise ValueError(
                f"features.pool: attention is contradiff's trained head, which {model} does not "
                "have; set features.pool: mean"
            )
        if self.model == "diffeed" and self.noising != "direct":
            raise ValueError(f"features.noising: {model} noises in one step; set it to direct")
        if self.model in ("diffeed", "timm") and self.more_blocks:
            raise ValueError(f"features.more_blocks: {model} fixes its blocks; set it to []")
        if is_timm and self.timm_name is None:
            raise ValueError(f"features.timm_name: {model} needs it (such as vit_base_patch16_224)")
        if is_timm and (self.timm_weights is None) != self.timm_pretrained:
            raise ValueError(
                f"features.timm_weights: {model} needs one source of weights: set this to a local "
                ".safetensors file, or set features.timm_pretrained: true to download them"
            )
        if is_timm and self.more_triples:
            raise ValueError(f"features.more_triples: {model} has no timesteps; set it to []")
        return self
