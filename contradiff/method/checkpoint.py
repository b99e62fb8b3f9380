"""Checkpoints of pretraining: the trained weights, and the settings to rebuild the model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from contradiff.config import Section, parse, read_card
from contradiff.files import explain_damage, load_tensors, sha256_of
from contradiff.method.model import ContraDiffModel, build_model
from contradiff.method.parameter_counts import ParameterCounts
from contradiff.method.params import Architecture
from contradiff.method.weights import CONFIG_NAME, WEIGHTS_NAME, write_weights


class CheckpointCard(Section):
    """Content of build/pretrain/config.json. `params` has all sections that pretraining read."""

    base_sha256: str
    image_size: int = Field(ge=8, multiple_of=8)
    num_steps: int = Field(ge=0)
    parameters: dict[str, Any]
    params: dict[str, Any]
    sha256: dict[str, str] = Field(description="weights file => its SHA-256")


def base_digest(base: Path, component: str = "unet") -> str:
    """Return the SHA-256 of each weight file of the base's UNet or VAE, joined by "+"."""
    return "+".join(sha256_of(path) for path in sorted((base / component).glob("*.safetensors")))


def save_checkpoint(
    folder: Path,
    model: ContraDiffModel,
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


def read_checkpoint_card(folder: Path) -> CheckpointCard:
    """Read a checkpoint's config.json; raises ValueError if it is missing or damaged."""
    return read_card(CheckpointCard, folder / CONFIG_NAME, stage="pretrain")


def load_checkpoint(
    folder: Path, *, base: Path, expected: Architecture | None = None
) -> ContraDiffModel:
    """Rebuild the model in evaluation mode.

    Raises ValueError if a file is missing or damaged, or if the model was trained on another base,
    or with other values of lora, conditioner or head than `expected` (the values in params.yaml).
    """
    card, path = read_checkpoint_card(folder), folder / WEIGHTS_NAME
    if card.base_sha256 != base_digest(base):
        fault = f"{folder / CONFIG_NAME}: the model was trained on another base than {base}"
        raise ValueError(f"{fault}; run `dvc repro pretrain`")
    if faults := "\n".join(_differences(folder, card.params, expected)):
        raise ValueError(faults)
    architecture = parse(Architecture, card.params, source=str(folder / CONFIG_NAME))
    remedy = f"run `dvc repro pretrain`, or fetch it with `dvc pull {folder}`"
    weights = load_tensors(path, sha256=card.sha256.get(WEIGHTS_NAME, "nothing"), remedy=remedy)
    model = build_model(base, architecture, image_size=card.image_size, seed=None)
    with explain_damage(path, remedy=remedy):
        model.load_trained_state(weights)
    return model.eval()


def _differences(
    folder: Path, trained: Mapping[str, Any], expected: Architecture | None
) -> Iterator[str]:
    """Yield a message for each value of `expected` that the checkpoint was not trained with."""
    for section in Architecture.model_fields if expected is not None else ():
        section_of = trained.get(section)
        old = section_of if isinstance(section_of, Mapping) else {}
        for key, value in getattr(expected, section).model_dump(mode="json").items():
            if key not in old or old[key] != value:
                with_what = f"with {old[key]!r}" if key in old else "before this parameter existed"
                fault = f"params.yaml has {value!r}, but {folder} was trained {with_what}"
                yield f"{section}.{key}: {fault}; run `dvc repro pretrain`"
