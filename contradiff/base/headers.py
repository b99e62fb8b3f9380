"""Reads the headers of a base's weight files: the names and shapes of its tensors.

The stage `validate` reads them each time. torch would take longer to import than all its checks.
"""

import json
from pathlib import Path

from contradiff.base.config import WEIGHTS_NAME
from contradiff.imports import slow_import


def linear_layers(folder: Path) -> list[str]:
    """Return the names of the UNet's linear layers: the matrices in the headers of its weights.

    If the weights are missing or damaged (`check_weights` says so), diffusers builds the UNet.
    """
    from safetensors import SafetensorError, safe_open

    names: list[str] = []
    try:
        for file in weight_files(folder / "unet"):
            with safe_open(folder / "unet" / file, framework="np") as tensors:
                keys = list[str](tensors.keys())
                ranks = {key: len(tensors.get_slice(key).get_shape()) for key in keys}
            names += [key.removesuffix(".weight") for key, rank in ranks.items() if rank == 2]
    except (OSError, ValueError, SafetensorError):
        with slow_import():
            from torch import nn

            from contradiff.base.loading import unet_without_weights

        unet = unet_without_weights(folder)
        return [name for name, part in unet.named_modules() if isinstance(part, nn.Linear)]
    return names


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files. Large models have several, which an index lists."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if (folder / WEIGHTS_NAME).is_file() or not index.is_file():
        return [WEIGHTS_NAME]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"base.path: {index} is damaged ({error!r}); get it again") from error
