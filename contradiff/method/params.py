"""Sections `noise`, `lora`, `conditioner`, `head` and `loss` of params.yaml."""

from typing import Any, Literal

from pydantic import Field, model_validator

from contradiff.config import Section

NUM_VIEWS = 2
NUM_LEVELS = 3
"""An image has two views; each view has three noise levels (query, key, value of Eq. 4)."""

MapBlock = Literal["mid", "up.1", "mid+up.1"]
"""UNet blocks whose output serves as maps f(z_t): the mid block, the second up block, or both."""


class NoiseParams(Section):
    """Parameters of section `noise`: how training timesteps are drawn."""

    schedule: Literal["inverse_cosine", "uniform"] = Field(
        description="inverse_cosine: mostly medium noise (Sec. 3.4) | uniform: all equally likely"
    )
    uniform_mix: float = Field(
        ge=0, le=1, description="chance that a reconstructed timestep is drawn uniformly"
    )


class LoraParams(Section):
    """Parameters of section `lora`. The paper uses rank 16 for q, k and v of cross-attention."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0, description="the update is scaled by alpha / rank")
    targets: list[str] = Field(min_length=1, description="how the names of adapted layers end")


class ConditionerParams(Section):
    """Parameters of section `conditioner`. The paper gives only width 512 and a parameter count."""

    input: Literal["pixels", "latents"] = Field(
        description="what the ViT reads: the image (paper) or the latent of the image"
    )
    patch_size: int = Field(ge=1, description="side of a patch, in pixels or latent positions")
    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    drop: float = Field(ge=0, lt=1, description="chance that noise replaces a condition (App. A)")
    cond_view: Literal["same", "crop", "noise", "noise_both"] = Field(
        description="same: both views share one condition (paper) | crop: the condition of each"
        " view is its own random crop | noise: like same, but the condition of view 2 is noise |"
        " noise_both: only reconstruction sees the condition, the contrastive loss sees noise"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ConditionerParams":
        if self.width % self.num_heads:
            raise ValueError("conditioner.width must be a multiple of conditioner.num_heads")
        return self


class HeadParams(Section):
    """Parameters of section `head`: the tri-timestep attention and the projector after it."""

    block: MapBlock = Field(
        description="UNet block whose output the attention reads: mid (paper) | up.1: the second "
        "up block, pooled to the size of mid | mid+up.1: both blocks"
    )
    width: int = Field(ge=1, description="width of the attention and the feature h; paper: 1024")
    residual: Literal["none", "value"] = Field(
        description="none: Eq. 4 as printed (paper) | value: add V to the attention's output, and "
        "add the mean of the tokens to the class token"
    )
    init: Literal["random", "identity"] = Field(
        description="initial weights; identity: at first, h is the mean of the least noisy map"
    )
    num_heads: int = Field(ge=1)
    mlp_ratio: int = Field(ge=1)
    self_conditioning: bool = Field(
        description="true: the up blocks also see the pooled output of mid (paper: false)"
    )
    projector_width: int = Field(ge=1)
    projector_out: int = Field(ge=1)

    @property
    def attention_arguments(self) -> dict[str, Any]:
        """Arguments of `TriTimestepAttention`, except `in_channels`."""
        names = {"width", "num_heads", "mlp_ratio", "residual", "init"}
        return self.model_dump(include=names)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "HeadParams":
        if self.width % self.num_heads:
            raise ValueError("head.width must be a multiple of head.num_heads; change one")
        return self


class LossParams(Section):
    """Parameters of section `loss`: reconstruction + lambda * contrastive (Eq. 7)."""

    weight: float = Field(alias="lambda", ge=0, description="weight of the contrastive loss")
    contrastive: Literal["ntxent", "dcl_paper", "dcl", "infonce", "dispersive"] = Field(
        description="which contrastive loss; dcl_paper is Eq. 6, averaged over images"
    )
    temperature: float = Field(gt=0, description="tau of Eq. 6, which divides the similarities")
    latent_views: Literal["same", "two"] = Field(
        description="same: both views are noisy versions of one latent (Eq. 5) | two: view 1 is"
        " made from the centre crop, and view 2 is made from a random crop"
    )
    recon_passes: int = Field(
        ge=1, le=6, description="how many of an image's six noisy latents are denoised (Eq. 3)"
    )
    min_snr_gamma: float = Field(
        ge=0,
        description="gamma of the weights in Eq. 3, see `min_snr_weights`; 0: none (paper)",
    )


class Architecture(Section):
    """The sections of params.yaml that decide the shapes of the trained weights."""

    lora: LoraParams
    conditioner: ConditionerParams
    head: HeadParams
