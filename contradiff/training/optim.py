"""Optimisers, the learning-rate schedule (Tables 1 and 2), and a moving average of weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.config import Section

NamedParameters = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class SgdSetting:
    """Settings that may differ between classifiers that are trained together."""

    lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class SgdSchedule:
    """Settings that are equal for all classifiers that are trained together."""

    batch_size: int
    """Size of the largest batch; batches of an epoch differ by at most one image."""
    epochs: int
    warmup_epochs: float


class SgdParams(Section):
    """Parameters of a classifier that SGD trains on fixed features (Table 2)."""

    section: ClassVar[str]

    lr: float = Field(gt=0, description="peak learning rate, not scaled by the batch size")
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(
        ge=0, description="L2 penalty; Table 2's 0.05 is too large: weights would stay near zero"
    )
    batch_size: int = Field(ge=2)
    epochs: int = Field(ge=1)
    warmup_epochs: float = Field(ge=0)

    @model_validator(mode="after")
    def _warmup_ends_within_training(self) -> "SgdParams":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"{self.section}.warmup_epochs is {self.warmup_epochs:g}, but must be less than "
                f"{self.section}.epochs, which is {self.epochs}; lower {self.section}.warmup_epochs"
            )
        return self

    @property
    def setting(self) -> SgdSetting:
        """Settings that may differ between classifiers that are trained together."""
        return SgdSetting(self.lr, self.momentum, self.weight_decay)

    @property
    def schedule(self) -> SgdSchedule:
        """Settings that are equal for all classifiers that are trained together."""
        return SgdSchedule(self.batch_size, self.epochs, self.warmup_epochs)


def cosine_with_warmup(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Return the factor of the learning rate: linear from 0 to 1, then half a cosine to 0.

    `step` is the number of optimiser steps already done. As in MAE, the first step with warm-up
    has the learning rate 0.
    """
    assert 0 <= step < total_steps, "beyond total_steps, the cosine would rise again"
    assert 0 <= warmup_steps <= total_steps, "the parameters' validators refuse longer warm-ups"
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices and kernels, not biases, norms, tokens."""
    return parameter.ndim > 1 and not name.endswith(("bias", "class_token", "positions"))


def build_adamw(
    named_parameters: NamedParameters, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW (Table 1) for the trainable parameters among `named_parameters`.

    The paper's "momentum 0.9" is the first beta. Biases, norms, class tokens and position
    embeddings have no weight decay; the paper does not mention such exceptions. Raises ValueError
    if no parameter is trainable.
    """
    trainable = [(name, param) for name, param in named_parameters if param.requires_grad]
    if not trainable:
        raise ValueError("lora.targets: there are no trainable parameters; name layers to adapt")
    groups = [
        {"params": [p for n, p in trainable if is_decayed(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in trainable if not is_decayed(n, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # `fused` runs one kernel per step, not several per tensor. On MPS or XLA, torch decides.
    fused = all(param.device.type in ("cpu", "cuda") for _, param in trainable)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)


class WeightAverage:
    """The exponential moving average (EMA) of trainable weights, computed by diffusers' EMAModel.

    `tensors` maps each parameter's name to its average.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.ema = EMAModel(self.parameters, decay=decay, foreach=True)
        self.tensors: dict[str, Tensor] = dict(zip(named, self.ema.shadow_params, strict=True))

    def update(self, done: int) -> None:
        """Update the average after step `done`; in the first steps, `decay` is reduced."""
        self.ema.optimization_step = done - 1
        self.ema.step(self.parameters)
