"""What pretraining leaves: the trained weights, and all that it takes to rebuild the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from contradiff.base.config import downsampling_of
from contradiff.base.loading import NoiseSchedule, load_unet
from contradiff.config import parse
from contradiff.files import replace_dir, sha256_of
from contradiff.method.model import Architecture, ContraDiff
from contradiff.method.parameter_counts import ParameterCounts

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def base_digest(base: Path) -> str:
    """Which UNet a checkpoint belongs to: sha256 over its weight files."""
    digests = [sha256_of(path) for path in sorted((base / "unet").glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else "+".join(digests)


def save_checkpoint(
    folder: Path,
    model: ContraDiff,
    *,
    base: Path,
    image_size: int,
    num_steps: int,
    counts: ParameterCounts,
    params: Mapping[str, Any],
) -> None:
    """Write the trained weights (not the base's) and config.json, whole or not at all.

    Args:
        folder: to write; an earlier one is replaced.
        model: after training.
        base: folder of the base that it was trained on.
        image_size: side of the conditioner's pixels.
        num_steps: optimiser steps taken.
        counts: trainable and frozen parameters.
        params: the parameters of the run, as JSON; `Architecture` is read back from them.
    """
    config = {
        "base_sha256": base_digest(base),
        "image_size": image_size,
        "num_steps": num_steps,
        "parameters": counts,
        "params": dict(params),
    }
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.trained_state().items()
    }
    with replace_dir(folder) as temporary:
        save_file(state, temporary / WEIGHTS_NAME)
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        ValueError: there is no checkpoint in `folder`.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{path}: no checkpoint; run `dvc repro pretrain`, or fetch it by `dvc pull {folder}`"
        )
    return json.loads(path.read_text())


def load_checkpoint(folder: Path, *, base: Path) -> ContraDiff:
    """Rebuild the model on its base, in evaluation mode, on the CPU.

    Raises:
        ValueError: no checkpoint, another base than it was trained on, or weights that do not fit.
    """
    config = read_config(folder)
    if config["base_sha256"] != base_digest(base):
        raise ValueError(f"{folder}: trained on another base than {base}; run `dvc repro pretrain`")
    architecture = parse(Architecture, config["params"], source=str(folder / CONFIG_NAME))
    model = ContraDiff(
        load_unet(base),
        NoiseSchedule.of_base(base),
        architecture,
        image_size=config["image_size"],
        downsampling=downsampling_of(base),
    )
    model.load_trained_state(load_file(folder / WEIGHTS_NAME))
    return model.eval()
