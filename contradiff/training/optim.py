"""Optimisers, the learning-rate schedule (Tables 1 and 2), and a moving average of weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NamedParameters = Iterable[tuple[str, nn.Parameter]]


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
