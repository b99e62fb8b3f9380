"""Everything that decides a pretraining: the sections of Table 1, together."""

from typing import Literal

from pydantic import Field, model_validator

from contradiff.config import Section, Seed
from contradiff.method.conditioner import ConditionerParams
from contradiff.method.losses import LossParams
from contradiff.method.noise import NoiseParams
from contradiff.types import Precision

Checkpointing = Literal["none", "down.0", "all"]
"""Which of the UNet's activations are computed again instead of kept."""


class PretrainParams(Section):
    """Section `pretrain` (Table 1)."""

    epochs: int = Field(ge=0, description="0: the base as it is, for Table 7's first row")
    warmup_epochs: float = Field(ge=0)
    batch_size: int = Field(ge=2, description="images a step, over all processes")
    lr: float = Field(gt=0, description="peak learning rate, or its base if scale_lr")
    scale_lr: bool = Field(description="multiply lr by batch_size / 256, as MAE does")
    beta1: float = Field(ge=0, lt=1, description="the paper's momentum 0.9")
    beta2: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    grad_accumulation: int = Field(
        ge=1, description="parts that a batch is taken in; negatives are those of one part"
    )
    ema_decay: float = Field(
        ge=0, lt=1, description="the trained weights' moving average is kept; 0: the last weights"
    )
    decode_batch_size: int = Field(
        ge=0,
        description="reconstructed draws, of a process, that go at once through the up blocks that "
        "the head does not read, their gradient taken before the next go: less memory; 0: all",
    )
    gradient_checkpointing: Checkpointing = Field(
        description="recompute activations in the backward pass: of the first down block, which "
        "keeps the most, or of the whole UNet"
    )
    precision: Precision = Field(description="of the passes, by autocast; what is trained is fp32")

    @model_validator(mode="after")
    def _parts_hold_pairs(self) -> "PretrainParams":
        parts = self.grad_accumulation
        if self.batch_size % parts or self.batch_size < 2 * parts:
            raise ValueError(
                f"pretrain.grad_accumulation: {parts} parts of pretrain.batch_size "
                f"{self.batch_size} must be equal and of two images or more"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends_within_training(self) -> "PretrainParams":
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"pretrain.warmup_epochs is {self.warmup_epochs:g}, which leaves nothing of the "
                f"{self.epochs} in pretrain.epochs: make it smaller"
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
        parts, batch = self.pretrain.grad_accumulation, self.pretrain.batch_size
        if parts == 1 or self.loss.weight == 0:
            return None
        return (
            f"pretrain.grad_accumulation: an image is contrasted with the {batch // parts} of its "
            f"part alone, not with all {batch} of pretrain.batch_size, and the projector's "
            "BatchNorm sees as many; pretrain.decode_batch_size and "
            "pretrain.gradient_checkpointing save memory without that"
        )
