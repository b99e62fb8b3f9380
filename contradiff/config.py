"""How params.yaml is read: each top-level key is one `Section`, defined where it is used.

Fields that affect results have no defaults in the code, so params.yaml shows every value.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

PRESETS = Path(__file__).parent / "presets"
"""Full parameter files, and configurations of bases: the project's presets/, also in a wheel."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A random seed. NumPy accepts no larger seeds."""

Precision = Literal["fp32", "bf16"]
"""Precision of forward and backward passes under autocast; trained weights stay float32."""


class Section(BaseModel):
    """A parameter section. It refuses unknown keys, NaN, infinities and values of a wrong type."""

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
    """Read a parameter file; raises ValueError if the file is missing, invalid or repeats a key.

    The reader is ruamel, because PyYAML would read small numbers like `1e-05` as strings.
    """
    from ruamel.yaml import YAML

    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; go to the project's root, or type `contradiff preset tiny`"
        )
    try:
        content: object = YAML(typ="safe").load(path)  # pyright: ignore[reportUnknownMemberType]
    except Exception as error:  # ruamel raises errors of several kinds
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of sections, found {type(content).__name__}")
    return content  # pyright: ignore[reportUnknownVariableType]


def parse(schema: type[SectionT], content: Mapping[str, Any], *, source: str) -> SectionT:
    """Validate those sections of a parameter file's `content` that are fields of `schema`.

    A field may also be a single key of a section, if its alias is a dotted key ("probe.head").
    Raises ValueError with a line for each wrong value. The line begins with `source` and the key.
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
    """Validate like `parse`, but also raise ValueError for keys that `schema` does not have."""
    try:
        return schema.model_validate(dict(content))
    except ValidationError as error:
        raise ValueError(_faults(error, source, "; see presets/tiny.yaml for all keys")) from None


def flatten(content: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value in nested mappings; a list is one value."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_card(schema: type[SectionT], path: Path, *, stage: str) -> SectionT:
    """Read the JSON file that `stage` wrote; raises ValueError if it is missing or invalid."""
    remedy = f"run `dvc repro {stage}`, or fetch it with `dvc pull {path.parent}`"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {remedy}")
    try:
        return schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{_faults(error, str(path), '')}; {remedy}") from None


def _faults(error: ValidationError, source: str, hint: str) -> str:
    """Return a line for each fault. `hint` ends the lines about keys that lack or are unknown."""
    return "\n".join(f"{source}: {_describe(fault, hint)}" for fault in error.errors())


def _describe(fault: ErrorDetails, hint: str) -> str:
    """Turn an error of pydantic into one line: `dotted.key: what is wrong (got value)`."""
    key = ".".join(str(part) for part in fault["loc"]) or "(whole file)"
    match fault["type"]:
        case "extra_forbidden":
            text = f"unknown key{hint}"
        case "missing":
            text = f"missing{hint}"
        case "json_invalid":
            text = fault["msg"]
        case _:
            text = fault["msg"].removeprefix("Value error, ")
            if not isinstance(fault["input"], dict):
                shown = repr(fault["input"])
                text += f" (got {shown if len(shown) <= 200 else shown[:200] + '…'})"
    # Messages of a section's own validator already begin with the key.
    return text if text.startswith(f"{key}.") else f"{key}: {text}"
