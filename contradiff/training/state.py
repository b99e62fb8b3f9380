"""The saved state of a training: weights, optimiser, number of steps, and loss curve."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from contradiff.files import replace_file

STATE_VERSION = 1
"""Increase this if a change of the code makes older states wrong: they are then not resumed."""


class SavedState:
    """A safetensors file with the state of a training after some steps.

    `tensors` come from a module's `state_dict()` and share memory with the module. So `save` writes
    the module's weights, and `resume` overwrites the module's weights. `every` is the number of
    optimiser steps between two saved states. `curve` has the rows of the loss curve.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Tensor], *, every: int) -> None:
        assert not any(name.startswith("optimizer.") for name in tensors)
        self.file, self.tensors, self.every = file, tensors, every
        self.curve: list[dict[str, float]] = []

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Replace the file by the state after `step` optimiser steps."""
        tensors = dict(self.tensors)
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with replace_file(self.file) as temporary:
            metadata = {"step": str(step), "curve": json.dumps(self.curve)}
            save_file(contiguous, temporary, metadata)

    def resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Load the file and return the number of steps done; without a file, return 0."""
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
