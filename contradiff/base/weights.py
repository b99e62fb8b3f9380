"""Checks the weights of a base before expensive work: their names, shapes, types and values."""

from collections.abc import Iterator
from pathlib import Path

import torch

from contradiff.base.config import GET_AGAIN, WEIGHTS_NAME
from contradiff.base.headers import weight_files
from contradiff.base.loading import unet_without_weights, vae_without_weights
from contradiff.files import explain_damage

MAX_FAULTS = 5  # that a message lists one by one
TYPES = "F64", "F32", "F16", "BF16"
EARLIER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Parts of names in early files, such as Stable Diffusion v1's VAE. diffusers renames them."""


def check_weights(folder: Path) -> None:
    """Raise ValueError if the weight files of the base in `folder` do not fit its configuration.

    Only the headers are read. Without this check, diffusers would fill missing tensors with random
    values.
    """
    builders = {"vae": vae_without_weights, "unet": unet_without_weights}
    faults = [
        f"base.path: {folder / part}/{fault}"
        for part, build in builders.items()
        for fault in _faults(
            folder / part,
            {name: list(tensor.shape) for name, tensor in build(folder).state_dict().items()},
        )
    ]
    _raise(faults)


def check_values(folder: Path) -> None:
    """Raise ValueError if the base in `folder` has a weight that is NaN or infinite.

    All files are read. Call `check_weights` first: it says more about files that are not whole.
    """
    from safetensors import safe_open

    files = [
        folder / part / file for part in ("vae", "unet") for file in weight_files(folder / part)
    ]
    faults: list[str] = []
    for file in files:
        with explain_damage(file, remedy=GET_AGAIN), safe_open(file, framework="pt") as tensors:
            faults += [
                f"base.path: {file}: {name} has NaN or infinite values"
                for name in list[str](tensors.keys())
                if not bool(torch.isfinite(tensors.get_tensor(name)).all())
            ]
    _raise(faults)


def _raise(faults: list[str]) -> None:
    if hidden := faults[MAX_FAULTS:]:
        faults[MAX_FAULTS:] = [f"base.path: {len(hidden)} more such faults"]
    if faults:
        raise ValueError("\n".join(faults))


def _faults(folder: Path, shapes: dict[str, list[int]]) -> Iterator[str]:
    """Yield a text for each fault, which begins with a file's name."""
    from safetensors import SafetensorError, safe_open

    found: set[str] = set()
    for file in weight_files(folder):
        if _is_pointer(folder / file):
            yield f"{file} is only a Git-LFS pointer; type `git lfs pull` where it comes from"
            return
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                for stored in list[str](tensors.keys()):
                    name = ".".join(EARLIER_NAMES.get(part, part) for part in stored.split("."))
                    found.add(name)
                    view = tensors.get_slice(stored)
                    if name not in shapes:
                        yield f"{file} has a tensor {stored} that config.json does not ask for"
                    elif (shape := view.get_shape()) != shapes[name]:
                        yield f"{file}: {stored} has shape {shape}, not {shapes[name]}"
                    elif (kind := view.get_dtype()) not in TYPES:
                        yield f"{file}: {stored} has type {kind}, not one of {', '.join(TYPES)}"
        except (OSError, SafetensorError) as error:
            yield f"{file} is missing, damaged or incomplete ({error}); get it again"
            return
    if missing := [name for name in shapes if name not in found]:
        more = f"{len(missing)} of {len(shapes)} tensors are missing, such as {missing[0]}"
        yield f"{WEIGHTS_NAME} does not fit config.json: {more}"


def _is_pointer(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(100).startswith(b"version https://git-lfs")
