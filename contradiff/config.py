"""Parameters: one top-level key of params.yaml is one `Section`, which lives with its owner.

Fields that affect results have no defaults in code: params.yaml shows every value.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""NumPy takes no larger seeds, and the product of a seed and a step fits 64 bits."""


class Section(BaseModel):
    """A parameter section: no unknown keys, NaN, infinities or silent conversions (true to 1.0)."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        validate_by_name=True,
        validate_by_alias=True,
    )


SectionT = TypeVar("SectionT", bound=Section)


def read_params(path: Path) -> dict[str, Any]:
    """Read a parameter file as DVC does; ValueError if it is missing, no mapping or repeats a key.

    ruamel reads YAML 1.2, where `1e-05`, which DVC writes, is a float; PyYAML makes it a string.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; run from the project's root, or copy presets/tiny.yaml to it"
        )
    try:
        content: object = YAML(typ="safe").load(path)  # pyright: ignore[reportUnknownMemberType]
    except YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of sections, found {type(content).__name__}")
    return content  # pyright: ignore[reportUnknownVariableType]


def parse(schema: type[SectionT], content: Mapping[str, Any], *, source: str) -> SectionT:
    """Validate the sections that `schema` has of a whole parameter file, which `source` names.

    As DVC has it, a stage may also depend on one key of a section: a field with the alias
    "probe.head". The ValueError has a line for each wrong value, with its dotted key.
    """
    chosen: dict[str, Any] = {}
    for field_name, field in schema.model_fields.items():
        name = field.alias or field_name
        section, _, key = name.rpartition(".")
        place = content.get(section) if section else content
        if isinstance(place, Mapping) and key in place:
            chosen[name] = place[key]
    return parse_exactly(schema, chosen, source=source)


def parse_exactly(schema: type[SectionT], content: Mapping[str, Any], *, source: str) -> SectionT:
    """Validate as `parse` does, but refuse keys that `schema` does not know."""
    try:
        return schema.model_validate(dict(content))
    except ValidationError as error:
        lines = [f"{source}: {_describe(fault)}" for fault in error.errors()]
        raise ValueError("\n".join(lines)) from None


def read_card(schema: type[SectionT], path: Path, *, stage: str) -> SectionT:
    """Read the JSON file in which a stage describes its outputs; ValueError if it is wrong."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file: run the stage {stage} first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    return parse_exactly(schema, content, source=str(path))


def _describe(fault: ErrorDetails) -> str:
    """Turn a fault that pydantic found into one line: `dotted.key: what is wrong (got value)`."""
    key = ".".join(str(part) for part in fault["loc"]) or "(whole file)"
    match fault["type"]:
        case "extra_forbidden" | "missing" as kind:
            text = "missing" if kind == "missing" else "unknown key"
            text += "; see presets/tiny.yaml for the keys that there are"
        case _:
            text = fault["msg"].removeprefix("Value error, ")
            if not isinstance(fault["input"], dict):
                text += f" (got {fault['input']!r})"
    # A section's own validator names the key itself.
    return text if text.startswith(f"{key}.") else f"{key}: {text}"
