"""The training loop of all trainers. A trainer only adds a set-up and a step function."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contradiff.signals import Stopped, postpone_signals
from contradiff.training.state import SavedState

if TYPE_CHECKING:
    from accelerate import Accelerator

StepFunction = Callable[[int], Mapping[str, Tensor | float]]
"""Gets the number of steps done; computes the next step's gradients; returns values to report."""

OnStep = Callable[[int, Mapping[str, float] | None], None]
"""Is called after every step with the number of steps done, and with its report or None."""


def train(
    step_function: StepFunction,
    *,
    steps: range,
    optimizer: torch.optim.Optimizer,
    lr: Callable[[int], float],
    lr_key: str,
    is_reported: Callable[[int], bool],
    on_step: OnStep,
    clipped: Iterable[nn.Parameter] = (),
    max_grad_norm: float | None = None,
    update_average: Callable[[int], None] | None = None,
    saved: SavedState | None = None,
    accelerator: "Accelerator | None" = None,
) -> None:
    """Run all steps, report values, and save the state every `saved.every` steps and at the end.

    There is a report if `is_reported` returns true, at the last step, and before a state is saved.
    If a reported value is not finite, the state is not saved, and the training ends with a
    ValueError that names `lr_key`, the dotted key of the learning rate. After SIGINT, SIGTERM or
    SIGUSR1, a training with `saved` finishes the step, saves its state and raises `Stopped`.

    `lr` returns the learning rate of a step. A report has "step", "lr" and the values of
    `step_function`, averaged over processes. With `max_grad_norm`, the gradients of `clipped` are
    clipped, and "grad_norm" is their norm before clipping. `update_average` is called after every
    optimiser step with the number of steps done.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> def step_function(step: int) -> dict[str, Tensor]:
        ...     loss = (model(torch.ones(1, 2)) - 3.0).square().mean()
        ...     loss.backward()
        ...     return {"loss": loss}
        >>> train(
        ...     step_function,
        ...     steps=range(50),
        ...     optimizer=optimizer,
        ...     lr=lambda step: 0.1 * (1 - step / 50),
        ...     lr_key="lr",
        ...     is_reported=lambda done: done % 25 == 0,
        ...     on_step=lambda done, row: print(done) if row and row["loss"] < 1e-3 else None,
        ... )
        25
        50
    """
    clipped = list(clipped)
    agree = _agreement(accelerator)
    with nullcontext(lambda: 0) if saved is None else postpone_signals() as signalled:
        for step in steps:
            rate = lr(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            done = step + 1
            values = {"step": float(done), "lr": rate, **step_function(step)}
            if max_grad_norm is not None:
                values["grad_norm"] = nn.utils.clip_grad_norm_(clipped, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if update_average is not None:
                update_average(done)
            stop = agree(signalled())
            is_last = done == steps.stop
            is_due = saved is not None and (stop or is_last or done % saved.every == 0)
            due = saved if is_due else None
            row = None
            if due is not None or is_reported(done) or is_last:
                row = {name: _read(value, accelerator) for name, value in values.items()}
                for name, value in row.items():
                    if not math.isfinite(value):
                        fault = f"the training diverged ({name} is {value} at step {done})"
                        raise ValueError(f"{lr_key}: {fault}; lower this rate")
            on_step(done, row)
            if due is not None and (accelerator is None or accelerator.is_main_process):
                due.save(done, optimizer)
            if stop:
                if accelerator is not None:
                    accelerator.wait_for_everyone()  # the message is true in every process
                raise Stopped(stop, saved=f"saved at step {done}")


def _agreement(accelerator: "Accelerator | None") -> Callable[[int], int]:
    """Return a function that returns the largest number that a process has called it with.

    Its processes talk by gloo, so that a GPU need not finish its work first.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return lambda number: number
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    assert isinstance(group, dist.ProcessGroup)

    def agree(number: int) -> int:
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        return int(largest)

    return agree


def _read(value: Tensor | float, accelerator: "Accelerator | None") -> float:
    if not isinstance(value, Tensor):
        return value
    mean = value.detach() if accelerator is None else accelerator.reduce(value.detach(), "mean")
    assert isinstance(mean, Tensor)
    return mean.item()
