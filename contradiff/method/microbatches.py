"""A mean loss whose gradient is computed for a few rows at a time, to save memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tensors = Sequence[Tensor]
LossOfRows = Callable[..., Tensor]
"""A function: a slice of rows and these rows of every input => the mean loss of these rows."""


def mean_in_microbatches(
    loss_of: LossOfRows, inputs: Tensors, parameters: Tensors, *, microbatch_size: int
) -> Tensor:
    """Return the mean of `loss_of` over all rows, computed a microbatch (a few rows) at a time.

    Each microbatch computes its loss and gradient, then frees its activations. Unlike
    checkpointing, this computes nothing twice. The result equals the usual mean and gradient up to
    the order of float sums. Call `backward` only once. `loss_of` gets detached inputs, and
    `parameters` must contain all parameters that `loss_of` trains.
    """
    return _Mean.apply(loss_of, microbatch_size, len(inputs), *inputs, *parameters)  # pyright: ignore[reportReturnType]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_of: LossOfRows, microbatch_size: int, num_inputs: int, *tensors: Tensor
    ) -> Tensor:
        gradients = {i: torch.zeros_like(t) for i, t in enumerate(tensors) if t.requires_grad}
        num_rows, mean = len(tensors[0]), torch.zeros((), device=tensors[0].device)

        def add_microbatch(rows: slice) -> Tensor:
            """Add the gradient of these rows; return their share of the mean."""
            inputs = tensors[:num_inputs]
            leaves = [t[rows].detach().requires_grad_(t.requires_grad) for t in inputs]
            given = (*leaves, *tensors[num_inputs:])
            with torch.enable_grad():
                share = loss_of(rows, *leaves) * ((rows.stop - rows.start) / num_rows)
            wanted = [given[i] for i in gradients]
            found = torch.autograd.grad(share, wanted, materialize_grads=True)
            for (i, gradient), part in zip(gradients.items(), found, strict=True):
                (gradient[rows] if i < num_inputs else gradient).add_(part)
            return share.detach()

        for start in range(0, num_rows, microbatch_size):
            mean = mean + add_microbatch(slice(start, min(start + microbatch_size, num_rows)))
        ctx.given = tuple(gradients)
        ctx.save_for_backward(*gradients.values())
        return mean

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients = dict(zip(ctx.given, ctx.saved_tensors, strict=True))
        found = (gradients.get(i) for i in range(len(ctx.needs_input_grad) - 3))
        return (None, None, None, *(None if g is None else grad_output * g for g in found))
