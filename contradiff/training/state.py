"""What a training resumes from: weights, the optimiser's moments, the step and the curve."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from contradiff.files import replace_file

STATE_VERSION = 1
"""Raise it when a saved state would mean something else: other weights, order or random numbers."""


class SavedState:
    """One safetensors file that holds a training as it was after some steps.

    `tensors` are the live weights, as `state_dict()` gives them: they share memory with the module,
    so `save` writes its values and `resume` overwrites them. `every` is the number of optimiser
    steps between two saved states. `curve` holds rows to plot later, saved with the weights.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Tensor], *, every: int) -> None:
        assert not any(name.startswith("optimizer.") for name in tensors)
        self.file, self.tensors, self.every = file, tensors, every
        self.curve: list[dict[str, float]] = []

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after `step` optimiser steps, whole or not at all."""
        tensors = dict(self.tensors)
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with replace_file(self.file) as temporary:
            metadata = {"step": str(step), "curve": json.dumps(self.curve)}
            save_file(contiguous, temporary, metadata)

    def resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Fill weights, moments and curve from the file; return the steps done, 0 without one."""
        if not self.file.is_file():
            return 0
        moments: dict[int, dict[str, Tensor]] = {}
        with safe_open(self.file, framework="pt") as file:
            metadata: dict[str, str] = file.metadata()
            keys = set(file.keys())
            for key in self.tensors:
                self.tensors[key].copy_(file.get_tensor(key))
            for key in keys - self.tensors.keys():
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = file.get_tensor(key)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self.curve = json.loads(metadata["curve"])
        return int(metadata["step"])
