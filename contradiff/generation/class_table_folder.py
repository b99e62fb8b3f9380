"""The folder of a class table: config.json and, unless class_condition.epochs is 0, the table."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from contradiff.config import Section, read_card
from contradiff.files import sha256_of
from contradiff.generation.params import ClassConditionParams
from contradiff.method.weights import CONFIG_NAME, WEIGHTS_NAME, write_weights

if TYPE_CHECKING:
    from contradiff.generation.class_table import ClassTable

TABLE_NAME = "table.safetensors"


class ClassTableCard(Section):
    """Content of build/class_condition/config.json. `checkpoint_sha256` is the model's SHA-256."""

    width: int = Field(ge=1)
    drop: float
    lora: bool
    checkpoint_sha256: str
    num_classes: int = Field(ge=1)
    num_steps: int = Field(ge=0)
    sha256: dict[str, str] = Field(description="weights file => its SHA-256")


def count_steps(params: ClassConditionParams, *, num_samples: int) -> int:
    """Return the number of optimiser steps. An epoch skips its last batch if it is not full.

    Raises ValueError if there are fewer images than a batch needs.
    """
    steps_per_epoch = num_samples // params.batch_size
    if params.epochs and steps_per_epoch == 0:
        given = f"class_condition.batch_size: {params.batch_size}"
        raise ValueError(f"{given} is more than the {num_samples} images; lower it")
    return params.epochs * steps_per_epoch


def save_class_table(
    folder: Path,
    table: "ClassTable | None",
    *,
    checkpoint: Path,
    num_classes: int,
    num_steps: int,
    params: ClassConditionParams,
) -> None:
    """Replace `folder` by a folder with config.json and, unless `table` is None, the table.

    `checkpoint` is the folder of the model that the table was trained with. `num_classes` does not
    include the null class.
    """
    config = params.model_dump(include={"drop", "lora", "width"}) | {
        "checkpoint_sha256": sha256_of(checkpoint / WEIGHTS_NAME),
        "num_classes": num_classes,
        "num_steps": num_steps,
    }
    write_weights(folder, {} if table is None else {TABLE_NAME: table.state_dict()}, config)


def read_class_card(folder: Path) -> ClassTableCard:
    """Read the config.json of a class table. Raises ValueError if it is missing or damaged."""
    return read_card(ClassTableCard, folder / CONFIG_NAME, stage="class_condition")
