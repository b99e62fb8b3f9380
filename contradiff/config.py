"""Parameters: one top-level key of params.yaml = one `Section`, which lives with its owner.

Result-affecting fields have no defaults in code: params.yaml shows every value.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Of everything random; NumPy takes no others, and products of it and a step fit 64 bits."""


class Section(BaseModel):
    """Base of all parameter sections.

    Unknown keys, NaN, infinities and silent conversions (`true` for 1.0) are refused.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        validate_by_name=True,
        validate_by_alias=True,
    )


S = TypeVar("S", bound=Section)


def read_params(path: Path) -> dict[str, Any]:
    """Read a parameter file as DVC reads it.

    YAML 1.2 through ruamel: `1e-05`, which DVC itself writes, is a float here; PyYAML would make
    it a string.

    Raises:
        ValueError: the file is missing, is no YAML mapping, or repeats a key.
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


def parse(schema: type[S], content: Mapping[str, Any], *, source: str) -> S:
    """Validate the keys of `content` that `schema` knows; other top-level keys belong to others.

    Args:
        schema: the sections that the caller uses, one field each; a field with an alias such as
            "probe.head" is one key of a section.
        content: a whole parameter file, as from `read_params`.
        source: the file's name, for messages.

    Raises:
        ValueError: one line for each wrong value, each beginning with its dotted key.
    """
    names = [field.alias or name for name, field in schema.model_fields.items()]
    chosen = {name: content[name] for name in names if name in content}
    # as DVC has it, a stage may depend on one key of another's section: "probe.head"
    for name in names:
        section, _, key = name.partition(".")
        if key and isinstance(content.get(section), Mapping) and key in content[section]:
            chosen[name] = content[section][key]
    return parse_exactly(schema, chosen, source=source)


def parse_exactly(schema: type[S], content: Mapping[str, Any], *, source: str) -> S:
    """Validate `content` whole: keys that `schema` does not know are refused.

    Raises:
        ValueError: one line for each wrong value, each beginning with its dotted key.
    """
    try:
        return schema.model_validate(dict(content))
    except ValidationError as error:
        raise ValueError(describe(error, source=source)) from None


def read_card(schema: type[S], path: Path, *, stage: str) -> S:
    """Read what a stage wrote of its outputs beside them, as JSON.

    Args:
        schema: of the whole file.
        path: the file.
        stage: that makes it, for the message where it is missing.

    Raises:
        ValueError: the file is missing or wrong.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file: run the stage {stage} first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    return parse_exactly(schema, content, source=str(path))


def describe(error: ValidationError, *, source: str) -> str:
    """Turn a pydantic error into one line a fault: `dotted.key: what is wrong (got value)`."""
    lines: list[str] = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "(whole file)"
        match fault["type"]:
            case "extra_forbidden":
                text = "unknown key; see presets/tiny.yaml for the keys that there are"
            case "missing":
                text = "missing; see presets/tiny.yaml for the keys that there are"
            case _:
                text = f"{fault['msg'].removeprefix('Value error, ')}"
                if not isinstance(fault["input"], dict):
                    text += f" (got {fault['input']!r})"
        # a section's own validators name the key that they speak of
        named = text.startswith(f"{key}.")
        lines.append(f"{source}: {text}" if named else f"{source}: {key}: {text}")
    return "\n".join(lines)
