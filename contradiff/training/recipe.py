"""The parameters of pretraining (Table 1)."""

from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Precision, Section, Seed
from contradiff.method.params import ConditionerParams, LossParams, NoiseParams

Checkpointing = Literal["none", "down.0", "all"]
"""UNet blocks whose activations the backward pass recomputes to save memory."""


class PretrainParams(Section):
    """Parameters of section `pretrain` (Table 1)."""

    epochs: int = Field(ge=0, description="0: no training (first row of Table 7)")
    warmup_epochs: float = Field(ge=0)
    batch_size: int = Field(ge=2, description="images per step, in all processes together")
    lr: float = Field(gt=0, description="peak learning rate, per 256 images if scale_lr is true")
    scale_lr: bool = Field(description="multiply lr by batch_size / 256, as MAE does")
    beta1: float = Field(ge=0, lt=1, description="the paper calls it momentum (0.9)")
    beta2: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    grad_accumulation: int = Field(
        ge=1, description="number of parts of a batch; only images of the same part are contrasted"
    )
    ema_decay: float = Field(
        ge=0, lt=1, description="decay of the moving average of weights; 0: no average"
    )
    decode_batch_size: int = Field(
        ge=0,
        description="noisy latents that a process denoises at once; fewer need less memory; 0: all",
    )
    gradient_checkpointing: Checkpointing = Field(
        description="where the backward pass recomputes activations: nowhere, in the first down "
        "block (which has the most), or in all blocks of the UNet"
    )
    precision: Precision = Field(description="of the computation; trained weights stay fp32")

    @model_validator(mode="after")
    def _microbatches_hold_pairs_and_warmup_ends(self) -> "PretrainParams":
        number, batch = self.grad_accumulation, self.batch_size
        if batch % number or batch < 2 * number:
            raise ValueError(
                f"pretrain.grad_accumulation: {number} microbatches need equal numbers of images, "
                f"two or more each, but pretrain.batch_size is {batch}; change one of the two"
            )
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"pretrain.warmup_epochs is {self.warmup_epochs:g}, but must be less than "
                f"pretrain.epochs, which is {self.epochs}; lower pretrain.warmup_epochs"
            )
        return self


class TrainingRecipe(Section):
    """The parameter sections that pretraining reads while it trains."""

    seed: Seed
    noise: NoiseParams
    conditioner: ConditionerParams
    loss: LossParams
    pretrain: PretrainParams

    @property
    def warning(self) -> str | None:
        """A warning for users who accumulate gradients with a contrastive loss, else None."""
        number, batch = self.pretrain.grad_accumulation, self.pretrain.batch_size
        if number == 1 or self.loss.weight == 0:
            return None
        return (
            f"pretrain.grad_accumulation: the contrastive loss and the projector's BatchNorm see "
            f"the {batch // number} images of one microbatch, not all {batch} of "
            "pretrain.batch_size; pretrain.decode_batch_size and pretrain.gradient_checkpointing "
            "save memory without this drawback"
        )
