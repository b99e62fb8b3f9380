"""Everything that decides a pretraining: the sections of Table 1, together."""

from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Section, Seed
from contradiff.method.conditioner import ConditionerParams
from contradiff.method.losses import LossParams
from contradiff.method.noise import NoiseParams
from contradiff.types import Precision

Checkpointing = Literal["none", "down.0", "all"]
"""Which of the UNet's activations the backward pass computes again, to save memory."""


class PretrainParams(Section):
    """Section `pretrain` (Table 1)."""

    epochs: int = Field(ge=0, description="0 keeps the base as it is, for Table 7's first row")
    warmup_epochs: float = Field(ge=0)
    batch_size: int = Field(ge=2, description="images a step, over all processes")
    lr: float = Field(gt=0, description="peak learning rate, before scale_lr")
    scale_lr: bool = Field(description="multiply lr by batch_size / 256, as MAE does")
    beta1: float = Field(ge=0, lt=1, description="the paper's momentum of 0.9")
    beta2: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    grad_accumulation: int = Field(
        ge=1, description="microbatches of a batch; negatives come from one microbatch only"
    )
    ema_decay: float = Field(
        ge=0, lt=1, description="decay of the weights' moving average; 0 keeps the last weights"
    )
    decode_batch_size: int = Field(
        ge=0,
        description="how many draws a process denoises at once; fewer need less memory; 0: all",
    )
    gradient_checkpointing: Checkpointing = Field(
        description="recompute activations in the backward pass: in the first down block, which "
        "keeps the most, or in the whole UNet"
    )
    precision: Precision = Field(description="precision of the passes; trained weights stay fp32")

    @model_validator(mode="after")
    def _microbatches_hold_pairs_and_warmup_ends(self) -> "PretrainParams":
        number, batch = self.grad_accumulation, self.batch_size
        if batch % number or batch < 2 * number:
            raise ValueError(
                f"pretrain.grad_accumulation: {number} microbatches must share the {batch} images "
                "of pretrain.batch_size equally, two or more each; change one of the two"
            )
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"pretrain.warmup_epochs is {self.warmup_epochs:g}, but must be less than "
                f"pretrain.epochs, which is {self.epochs}: make it smaller"
            )
        return self


class TrainingRecipe(Section):
    """The sections that decide a training, together."""

    seed: Seed
    noise: NoiseParams
    conditioner: ConditionerParams
    loss: LossParams
    pretrain: PretrainParams

    @property
    def warning(self) -> str | None:
        """What a user should know who accumulates gradients of a contrastive loss."""
        number, batch = self.pretrain.grad_accumulation, self.pretrain.batch_size
        if number == 1 or self.loss.weight == 0:
            return None
        return (
            f"pretrain.grad_accumulation: the contrastive loss and the projector's BatchNorm see "
            f"the {batch // number} images of one microbatch, not all {batch} of "
            "pretrain.batch_size; pretrain.decode_batch_size and pretrain.gradient_checkpointing "
            "save memory without this"
        )
