"""The saved state of a training: weights, optimiser, number of steps, and loss curve."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from contradiff.files import explain_damage, replace_file

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
            metadata["sha256"] = _digest(contiguous, metadata)
            save_file(contiguous, temporary, metadata)

    def resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Load the file and return the number of steps done; without a file, return 0.

        Raises ValueError if the file is damaged, or is the state of another model.
        """
        if not self.file.is_file():
            return 0
        remedy = "delete this file to train from step 0"
        with explain_damage(self.file, remedy=remedy), safe_open(self.file, "pt") as file:
            metadata: dict[str, str] = dict(file.metadata())
            loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # A state that an earlier version of this project saved has no digest.
            if metadata.pop("sha256", None) not in {None, _digest(loaded, metadata)}:
                raise ValueError("its content does not have the sha256 in its header")
            moments: dict[int, dict[str, Tensor]] = {}
            for key in loaded.keys() - self.tensors.keys():
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = loaded[key]
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
            for key, tensor in self.tensors.items():
                tensor.copy_(loaded[key])
            self.curve = json.loads(metadata["curve"])
            return int(metadata["step"])


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a SHA-256 of the tensors' names and bytes and of the metadata."""
    hasher = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
