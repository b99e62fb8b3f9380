"""Learning-rate schedule and optimisers (Tables 1 and 2)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from contradiff.config import Section

REFERENCE_BATCH_SIZE = 256
"""The batch size that a base learning rate refers to, as in MAE."""


@dataclass(frozen=True)
class SgdSetting:
    """The settings in which classifiers may differ when they are trained together.

    Attributes:
        lr: Peak learning rate.
        momentum: SGD's momentum.
        weight_decay: L2 penalty of weights and biases.
    """

    lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class SgdSchedule:
    """The settings that classifiers share when they are trained together.

    Attributes:
        batch_size: Largest batch; the batches of an epoch differ by at most one in size.
        epochs: Passes over all the samples.
        warmup_epochs: Length of the linear warm-up, after which the rate falls along half a cosine.
    """

    batch_size: int
    epochs: int
    warmup_epochs: float


class SgdParams(Section):
    """Settings of a classifier trained by SGD on fixed features (Table 2)."""

    section: ClassVar[str]

    lr: float = Field(gt=0, description="peak learning rate, not scaled by the batch size")
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(
        ge=0, description="L2 penalty; Table 2's 0.05 taken literally destroys an SGD linear head"
    )
    batch_size: int = Field(ge=2)
    epochs: int = Field(ge=1)
    warmup_epochs: float = Field(ge=0)

    @model_validator(mode="after")
    def _warmup_ends_within_training(self) -> "SgdParams":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"{self.section}.warmup_epochs is {self.warmup_epochs:g}, but must be less than "
                f"{self.section}.epochs, which is {self.epochs}: make it smaller"
            )
        return self

    @property
    def setting(self) -> SgdSetting:
        """The settings in which classifiers may differ when they are trained together."""
        return SgdSetting(self.lr, self.momentum, self.weight_decay)

    @property
    def schedule(self) -> SgdSchedule:
        """The settings that they share."""
        return SgdSchedule(self.batch_size, self.epochs, self.warmup_epochs)


def cosine_with_warmup(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Multiplier of the learning rate: linear from 0 to 1, then half a cosine to 0.

    As in MAE, the first step of a run with warm-up has the rate 0, and step `total_steps`, which
    a run of that many steps does not take, would have it again.

    Args:
        step: optimiser steps taken before this one, in [0, total_steps].
        total_steps: steps of the whole run.
        warmup_steps: steps of the linear part.
    """
    assert 0 <= step <= total_steps, "the cosine would rise again beyond its end"
    assert 0 <= warmup_steps <= total_steps, "parameters refuse longer warm-ups"
    if step < warmup_steps:
        return step / warmup_steps
    if warmup_steps == total_steps:
        return 1.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_lr(lr: float, *, batch_size: int, enabled: bool) -> float:
    """Return the rate for a global batch: lr · batch / 256 as in MAE if enabled, else lr."""
    return lr * batch_size / REFERENCE_BATCH_SIZE if enabled else lr


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms and tokens."""
    return parameter.ndim > 1 and not name.endswith(("bias", "class_token", "positions"))


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    """Build AdamW (Table 1) for the trainable parameters.

    Weight decay leaves out biases, norms, class tokens and position embeddings; the paper does not
    say whether it should.

    Args:
        named_parameters: From `module.named_parameters()`; frozen ones are ignored.
        lr: Initial learning rate of both groups.
        betas: Decay rates of the moments; the paper's "momentum 0.9" is the first.
        weight_decay: Decoupled weight decay of the decayed group.

    Returns:
        An optimiser with one or two groups: first the decayed parameters, then the others.

    Raises:
        ValueError: No parameter is trainable.
    """
    trainable = [(name, param) for name, param in named_parameters if param.requires_grad]
    if not trainable:
        raise ValueError(
            "no trainable parameters: check lora.targets, and that not all modules are frozen"
        )
    decayed = [param for name, param in trainable if is_decayed(name, param)]
    plain = [param for name, param in trainable if not is_decayed(name, param)]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, weight_decay), (plain, 0.0))
        if params
    ]
    # One kernel a step instead of several a tensor; on MPS or XLA torch decides.
    fused = all(param.device.type in ("cpu", "cuda") for _, param in trainable)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)
