"""A mean loss whose gradient is taken a few rows at a time, while the forward pass goes on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LossOfRows = Callable[..., Tensor]
"""(rows, *their part of each sliced tensor) => the mean loss of these rows."""


def mean_in_parts(
    loss_of: LossOfRows,
    sliced: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    rows_at_once: int,
) -> Tensor:
    """The mean of `loss_of` over all rows, keeping the activations of `rows_at_once` at most.

    Each part's gradient is taken as soon as its loss is known, and its activations are dropped
    before the next part runs. The backward pass then only hands on what was found: nothing is
    computed twice, as it is by checkpointing, and the gradient is the same, up to the order of its
    sum. Only what comes behind `sliced` is taken apart: what made them is kept as always.

    Args:
        loss_of: called with a slice of rows and, detached, these rows of `sliced`.
        sliced: tensors of as many rows each, to which the gradient flows on.
        parameters: all that `loss_of` trains, or nothing of them would be learnt.
        rows_at_once: rows of a part; the last part may have fewer.

    Returns:
        A scalar. It can be differentiated once.
    """
    return _MeanInParts.apply(loss_of, rows_at_once, len(sliced), *sliced, *parameters)  # pyright: ignore[reportReturnType]


class _MeanInParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss_of: LossOfRows,
        rows_at_once: int,
        num_sliced: int,
        *tensors: Tensor,
    ) -> Tensor:
        gradients = {i: torch.zeros_like(t) for i, t in enumerate(tensors) if t.requires_grad}
        num_rows, mean = len(tensors[0]), torch.zeros((), device=tensors[0].device)
        for start in range(0, num_rows, rows_at_once):
            rows = slice(start, min(start + rows_at_once, num_rows))
            mean = mean + _add_part(gradients, loss_of, rows, tensors, num_sliced=num_sliced)
        ctx.given = tuple(gradients)
        ctx.save_for_backward(*gradients.values())
        return mean

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients = dict(zip(ctx.given, ctx.saved_tensors, strict=True))
        num_tensors = len(ctx.needs_input_grad) - 3
        found = (gradients.get(i) for i in range(num_tensors))
        return (None, None, None, *(None if g is None else grad_output * g for g in found))


def _add_part(
    gradients: Mapping[int, Tensor],
    loss_of: LossOfRows,
    rows: slice,
    tensors: Sequence[Tensor],
    *,
    num_sliced: int,
) -> Tensor:
    """Add one part's gradient; returns its share of the mean. All else is freed on return."""
    leaves = [t[rows].detach().requires_grad_(t.requires_grad) for t in tensors[:num_sliced]]
    inputs = (*leaves, *tensors[num_sliced:])
    with torch.enable_grad():
        share = loss_of(rows, *leaves) * ((rows.stop - rows.start) / len(tensors[0]))
    wanted = [inputs[i] for i in gradients]
    found = torch.autograd.grad(share, wanted, materialize_grads=True)
    for (i, gradient), part in zip(gradients.items(), found, strict=True):
        (gradient[rows] if i < num_sliced else gradient).add_(part)
    return share.detach()
