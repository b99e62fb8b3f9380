"""What a training resumes from: weights, AdamW's moments and the step, in one file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from contradiff.files import replace_file

STATE_VERSION = 1
"""Raise it when a saved state would mean something else: other weights, order or random numbers."""

_OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class TrainingState:
    """A training after some steps.

    Attributes:
        step: optimiser steps done.
        parts: state dicts by a name without dots, such as "model" and "average".
        notes: texts that belong to it.
        moments: AdamW's, by the parameter's index.
    """

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    notes: Mapping[str, str]
    moments: Mapping[int, Mapping[str, Tensor]]

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give a new optimiser of the same parameters its moments; its options stay."""
        optimizer.load_state_dict({**optimizer.state_dict(), "state": self.moments})


def save_training_state(
    path: Path,
    *,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    notes: Mapping[str, str],
) -> None:
    """Write a safetensors file, whole or not at all; see `TrainingState`."""
    assert _OPTIMIZER not in parts
    assert "step" not in notes
    tensors = {f"{part}.{name}": value for part in parts for name, value in parts[part].items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}.{index}.{name}": value for name, value in moments.items()}
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replace_file(path) as temporary:
        save_file(contiguous, temporary, {**notes, "step": str(step)})


def load_training_state(path: Path) -> TrainingState | None:
    """Read what `save_training_state` wrote, on the CPU; None if there is no such file."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        notes = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    step = int(notes.pop("step"))
    parts: dict[str, dict[str, Tensor]] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        if part == _OPTIMIZER:
            index, moment = name.split(".", 1)
            moments.setdefault(int(index), {})[moment] = value
        else:
            parts.setdefault(part, {})[name] = value
    return TrainingState(step, parts, notes, moments)
