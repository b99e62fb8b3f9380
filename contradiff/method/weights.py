"""Writes a folder of trained weights: safetensors files, and config.json, which describes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contradiff.files import replace_dir, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def write_weights(
    folder: Path, files: "Mapping[str, Mapping[str, Tensor]]", config: Mapping[str, Any]
) -> None:
    """Replace `folder` by a safetensors file for each entry of `files`, and config.json.

    config.json also gets the key `sha256`: the SHA-256 of each file. Raises ValueError if a weight
    is not finite.
    """
    for name, tensor in (pair for tensors in files.values() for pair in tensors.items()):
        if not bool(tensor.isfinite().all()):
            fault = f"the weight {name} is not finite, so the training diverged"
            raise ValueError(f"{folder}: {fault}; lower its learning rate")
    with replace_dir(folder) as temporary:
        for name, tensors in files.items():
            _save(tensors, temporary / name)
        whole = {**config, "sha256": {name: sha256_of(temporary / name) for name in files}}
        (temporary / CONFIG_NAME).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def _save(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    # This imports torch, for which a folder without tensors need not wait.
    from safetensors.torch import save_file

    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
