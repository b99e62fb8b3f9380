"""Checkpoints of pretraining: the trained weights, and the settings to rebuild the model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from contradiff.config import parse
from contradiff.files import replace_dir, sha256_of
from contradiff.method.model import Architecture, ContraDiff, build_model
from contradiff.method.parameter_counts import ParameterCounts

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def base_digest(base: Path, component: str = "unet") -> str:
    """Return the SHA-256 of each weight file of the base's UNet or VAE, joined by "+"."""
    return "+".join(sha256_of(path) for path in sorted((base / component).glob("*.safetensors")))


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
    """Replace `folder` by the trained weights and a config.json that contains `params`."""
    config = {"base_sha256": base_digest(base), "image_size": image_size, "num_steps": num_steps}
    config |= {"parameters": counts, "params": dict(params)}
    write_weights(folder, {WEIGHTS_NAME: model.trained_state()}, config)


def write_weights(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> None:
    """Replace `folder` by one safetensors file for each entry of `files`, and config.json."""
    with replace_dir(folder) as temporary:
        for name, tensors in files.items():
            state = {key: value.cpu().contiguous() for key, value in tensors.items()}
            save_file(state, temporary / name)
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def read_config(
    folder: Path, *, what: str = "checkpoint", stage: str = "pretrain"
) -> dict[str, Any]:
    """Read the config.json that `stage` wrote; raises ValueError ("no `what`") if it is missing."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        remedy = f"run `dvc repro {stage}`, or fetch it with `dvc pull {folder}`"
        raise ValueError(f"{path}: no {what}; {remedy}")
    return json.loads(path.read_text())


def load_checkpoint(
    folder: Path, *, base: Path, expected: Architecture | None = None
) -> ContraDiff:
    """Rebuild the model in evaluation mode.

    Raises ValueError if the model was trained on another base, or with other values of lora,
    conditioner or head than `expected` (the values in params.yaml).
    """
    config = read_config(folder)
    if config["base_sha256"] != base_digest(base):
        raise ValueError(f"{folder}: trained on another base than {base}; run `dvc repro pretrain`")
    if faults := "\n".join(_differences(folder, config["params"], expected)):
        raise ValueError(faults)
    architecture = parse(Architecture, config["params"], source=str(folder / CONFIG_NAME))
    model = build_model(base, architecture, image_size=config["image_size"], seed=None)
    model.load_trained_state(load_file(folder / WEIGHTS_NAME))
    return model.eval()


def _differences(
    folder: Path, trained: Mapping[str, Any], expected: Architecture | None
) -> Iterator[str]:
    """Yield a message for each value of `expected` that the checkpoint was not trained with."""
    for section in Architecture.model_fields if expected is not None else ():
        old = trained.get(section, {})
        for key, value in getattr(expected, section).model_dump(mode="json").items():
            if key not in old or old[key] != value:
                with_what = f"with {old[key]!r}" if key in old else "before this parameter existed"
                fault = f"params.yaml has {value!r}, but {folder} was trained {with_what}"
                yield f"{section}.{key}: {fault}; run `dvc repro pretrain`"
