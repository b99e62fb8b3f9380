"""Learning-rate schedule and optimisers (Tables 1 and 2)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from contradiff.config import Section

# The batch size for which a base learning rate is stated, as in MAE.
REFERENCE_BATCH_SIZE = 256

_CLASS_TOKENS = ("cls", "cls_token", "class_token")
_POSITION_PREFIXES = ("pos_embed", "position")


@dataclass(frozen=True)
class SgdSetting:
    """What tells classifiers apart that are trained together.

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
    """What classifiers that are trained together have in common.

    Attributes:
        batch_size: Greatest batch.
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
                f"{self.section}.warmup_epochs is {self.warmup_epochs:g}, which leaves nothing of "
                f"the {self.epochs} in {self.section}.epochs: make it smaller"
            )
        return self

    @property
    def setting(self) -> SgdSetting:
        """What may differ between classifiers that are trained together."""
        return SgdSetting(self.lr, self.momentum, self.weight_decay)

    @property
    def schedule(self) -> SgdSchedule:
        """What they have in common."""
        return SgdSchedule(self.batch_size, self.epochs, self.warmup_epochs)


def cosine_with_warmup(
    step: int, *, total_steps: int, warmup_steps: int, final: float = 0.0
) -> float:
    """Multiplier of the learning rate: linear from 0 to 1, then half a cosine to `final`.

    As in MAE, the first step of a run with warm-up has the rate 0, and step `total_steps`, which
    a run of that many steps does not take, would have the rate `final`.

    Args:
        step: Optimiser steps taken before this one, in [0, total_steps].
        total_steps: Steps of the whole run.
        warmup_steps: Steps of the linear part.
        final: Multiplier at the end.

    Raises:
        ValueError: the step is outside the run, or the warm-up is longer than it.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warm-up of {warmup_steps} steps in a run of {total_steps}: lower warmup_epochs"
        )
    if not 0 <= step <= total_steps:
        # The cosine would rise again beyond its end.
        raise ValueError(f"step {step} is outside a run of {total_steps} steps")
    if step < warmup_steps:
        return step / warmup_steps
    if warmup_steps == total_steps:
        return 1.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_lr(lr: float, *, batch_size: int, enabled: bool) -> float:
    """The learning rate for a global batch: lr · batch / 256 as in MAE if enabled, else lr."""
    return lr * batch_size / REFERENCE_BATCH_SIZE if enabled else lr


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms and tokens."""
    components = name.split(".")
    is_token = components[-1] in _CLASS_TOKENS
    is_position = any(component.startswith(_POSITION_PREFIXES) for component in components)
    return parameter.ndim > 1 and not name.endswith("bias") and not (is_token or is_position)


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW (Table 1) over the trainable ones of `named_parameters`.

    Biases, norms, class tokens and position embeddings are not decayed; the paper does not say.

    Args:
        named_parameters: As from `module.named_parameters()`; frozen ones are left out.
        lr: Initial learning rate of both groups.
        betas: Decay rates of the moments; the paper's "momentum 0.9" is the first.
        weight_decay: Decoupled weight decay of the decayed group.

    Returns:
        An optimiser of one or two groups: the decayed parameters first, then the others.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = [(name, param) for name, param in named_parameters if param.requires_grad]
    if not trainable:
        raise ValueError(
            "no trainable parameters: check that lora.targets and the modules are not all frozen"
        )
    decayed = [param for name, param in trainable if is_decayed(name, param)]
    plain = [param for name, param in trainable if not is_decayed(name, param)]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, weight_decay), (plain, 0.0))
        if params
    ]
    # One kernel instead of several over each tensor; elsewhere (MPS, XLA) torch decides.
    fused = all(param.device.type in ("cpu", "cuda") for _, param in trainable)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)
