"""Section `features` of params.yaml, and the description of a single feature."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Precision, Section
from contradiff.method.params import NUM_LEVELS, MapBlock

CHAIN_STEPS = 20
"""Number of timesteps of the DDIM inversion. The paper's probe is "using 20 denoising steps"."""


@dataclass(frozen=True)
class FeatureSpec:
    """A feature. For timm, `triple` (three timesteps) and `block` (of the UNet) are None."""

    name: str
    triple: tuple[int, ...] | None
    block: str | None
    pool: str


class FeaturesParams(Section):
    """Section `features`: which frozen features are computed, and how they are stored."""

    model: Literal["contradiff", "base", "diffeed", "timm"] = Field(
        description="contradiff: the trained model | base: its base, no LoRA, zeros as condition "
        "(Table 3's SD Features) | diffeed: the base runs twice, with feedback | timm: a backbone"
    )
    timm_name: str | None = Field(description="timm: the name for timm.create_model")
    timm_weights: str | None = Field(description="timm: a local .safetensors file with weights")
    timm_pretrained: bool = Field(description="timm: download weights; set timm_weights: null")
    timesteps: list[int] = Field(description="the three fixed timesteps of evaluation")
    more_triples: list[list[int]] = Field(description="other lists of three timesteps to test")
    more_blocks: list[MapBlock] = Field(
        description="other UNet blocks whose maps, averaged over space, are tested as well"
    )
    noising: Literal["direct", "ddim_chain"] = Field(
        description="direct: noise in one step (Eq. 5) | ddim_chain: 20-step DDIM inversion"
    )
    condition: Literal["image", "noise"] = Field(
        description="input of contradiff's conditioner; other models do not use it"
    )
    pool: Literal["attention", "mean"] = Field(
        description="attention: h of Eq. 4 | mean: the maps averaged over space (SD Features), or "
        "the backbone's own pooled feature (timm)"
    )
    dtype: Literal["fp16", "bf16"] = Field(description="type of the stored features")
    precision: Precision = Field(description="precision of the computation; bf16: autocast")
    batch_size: int = Field(ge=1)

    @property
    def triples(self) -> list[list[int]]:
        """Lists of three timesteps ("triples"): first `timesteps`, then those of `more_triples`."""
        return [self.timesteps, *self.more_triples]

    @model_validator(mode="after")
    def _distinct(self) -> "FeaturesParams":
        for number, triple in enumerate(self.triples):
            if len(triple) != NUM_LEVELS or len(set(triple)) < NUM_LEVELS or min(triple) < 0:
                key = "features.more_triples" if number else "features.timesteps"
                raise ValueError(f"{key}: {triple}: set three different timesteps of 0 or more")
        if len(set(map(frozenset, self.triples))) < len(self.triples):
            fault = "a list has the same timesteps as another, or as features.timesteps"
            raise ValueError(f"features.more_triples: {fault}; remove one of the two")
        if len(set(self.more_blocks)) < len(self.more_blocks):
            raise ValueError(f"features.more_blocks: {self.more_blocks}: name each block once")
        return self

    @model_validator(mode="after")
    def _baselines_have_their_own_shape(self) -> "FeaturesParams":
        is_timm, model = self.model == "timm", f"features.model: {self.model}"
        if self.model != "contradiff" and self.pool == "attention":
            raise ValueError(
                "features.pool: attention needs contradiff's trained head, which is not part of "
                f"{model}; set features.pool: mean"
            )
        if self.model == "diffeed" and self.noising != "direct":
            raise ValueError(f"features.noising: set it to direct, as {model} requires")
        if self.model in ("diffeed", "timm") and self.more_blocks:
            raise ValueError(f"features.more_blocks: set it to []; {model} does not use it")
        if is_timm and self.timm_name is None:
            raise ValueError("features.timm_name: set a model, such as vit_base_patch16_224")
        if is_timm and (self.timm_weights is None) != self.timm_pretrained:
            raise ValueError(
                f"features.timm_weights: for {model}, either set this to a local .safetensors "
                "file, or set features.timm_pretrained: true to download weights; not both"
            )
        if is_timm and self.more_triples:
            raise ValueError(f"features.more_triples: set it to []; {model} has no timesteps")
        return self
