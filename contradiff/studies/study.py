"""A study: the question, the experiments that answer it, and what the paper printed."""

import json
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from contradiff.config import Section, Seed, parse_exactly, read_params

FOLDER = Path("studies")
Changes = dict[str, Any]
"""Dotted key of params.yaml => value."""


class Column(Section):
    """A score. The key's first part names the file: `probe.top1` is in metrics/probe.json."""

    title: str
    key: str = Field(pattern=r"^\w+(\.[\w-]+)+$", description="dotted key in metrics/*.json")
    format: str = Field(pattern=r"^,?\.\d[%f]$", description="format of the number: .1%, .2f")
    better: Literal["up", "down"] | None = Field(description="which direction is better")

    @property
    def heading(self) -> str:
        """The title with an arrow that says which direction is better."""
        arrow = {"up": " ↑", "down": " ↓", None: ""}[self.better]
        return f"{self.title}{arrow}"


class Row(Section):
    """A row of the table: an experiment for each seed, or a method that only the paper has."""

    title: str
    set: Changes | None = Field(default=None, description="changes; null: only in the paper")
    read: dict[str, str] = Field(
        default_factory=dict, description="column => another dotted key for this row"
    )
    paper: dict[str, str] = Field(
        default_factory=dict, description="column => the value that the paper printed"
    )
    protocol: str = Field(default="", description="how this row was measured here")


class Bubble(Section):
    """Two columns that span a figure, in which a circle's area is the trainable parameters."""

    x: str
    y: str


class Study(Section):
    """Content of a file in studies/. Errors name the row and what is wrong."""

    question: str
    paper: str = Field(description="the paper's table and protocol; empty if it has none")
    differences: list[str] = Field(description="how our protocol differs from the paper's")
    seeds: list[Seed] = Field(min_length=1)
    targets: list[str] = Field(description="stages to run; []: all")
    fixed: Changes = Field(description="changes that all rows share")
    columns: dict[str, Column] = Field(min_length=1)
    rows: list[Row] = Field(min_length=1)
    baseline: str | None = Field(description="title of the row that the others are compared with")
    curve: list[str] = Field(description="columns that the main figure shows, row by row")
    bubble: Bubble | None
    samples: bool = Field(description="whether to show samples of the first seed")

    @model_validator(mode="after")
    def _is_consistent(self) -> "Study":
        bubble = [self.bubble.x, self.bubble.y] if self.bubble else []
        named = [("curve", name) for name in self.curve] + [("bubble", name) for name in bubble]
        for row in self.rows:
            named += [(f'row "{row.title}"', name) for name in (*row.read, *row.paper)]
            keys = {**self.fixed, **(row.set or {})}
            for key in ("seed", "runtime"):
                if any(name.split(".")[0] == key for name in keys):
                    raise ValueError(f'row "{row.title}": {key} is not for `set`; use `seeds`')
        for place, name in named:
            if name not in self.columns:
                raise ValueError(f'{place}: "{name}" is no column; add it to columns')
        titles = [row.title for row in self.own_rows]
        for what, values in (
            ("seed", self.seeds),
            ("title", [row.title for row in self.rows]),
        ):
            repeated = [value for value, number in Counter(values).items() if number > 1]
            if repeated:
                raise ValueError(f"rows or seeds: repeated {what} {repeated[0]}; remove one")
        points: dict[str, str] = {}
        for row in self.own_rows:
            point = f"{point_of(row.set or {})} {point_of(row.read)}"
            if (other := points.setdefault(point, row.title)) != row.title:
                raise ValueError(
                    f'row "{row.title}": repeats the point of row "{other}"; remove one'
                )
        if self.baseline is not None and self.baseline not in titles:
            raise ValueError(f'baseline: no row with `set` has the title "{self.baseline}"')
        return self

    @property
    def own_rows(self) -> list[Row]:
        """The rows that we measure."""
        return [row for row in self.rows if row.set is not None]

    def key_of(self, row: Row, column: str) -> str:
        """Return the dotted key of a row's value."""
        return row.read.get(column, self.columns[column].key)

    @property
    def keys(self) -> list[str]:
        """All dotted keys that the study reads, sorted."""
        return sorted({self.key_of(row, name) for row in self.own_rows for name in self.columns})

    @property
    def stages(self) -> list[str]:
        """The stages whose results the study reads, sorted."""
        return sorted({key.partition(".")[0] for key in self.keys})


def study_names(root: Path) -> list[str]:
    """Return the names of the studies of a project, sorted."""
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


def read_study(root: Path, name: str) -> Study:
    """Read studies/NAME.yaml; raises ValueError if there is none, or if it has a fault."""
    names = study_names(root)
    if name not in names:
        if not names:
            raise ValueError(f"{FOLDER}/: no studies here; go to the root of the project")
        near = get_close_matches(name, names, n=1, cutoff=0)
        raise ValueError(
            f"{name}: no such study; did you mean {near[0]}? There are {', '.join(names)}"
        )
    path = FOLDER / f"{name}.yaml"
    try:
        return parse_exactly(Study, read_params(root / path), source=str(path))
    except ValueError as error:
        hint = "; see presets/tiny.yaml for all keys"
        raise ValueError(str(error).replace(hint, "; see studies/table8.yaml")) from None


def changes_of(study: Study, row: Row) -> Changes:
    """Return all changes of a row, those that the rows share included."""
    return {**study.fixed, **(row.set or {})}


def look_up(params: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; raises KeyError if it is missing."""
    value: Any = params
    for part in key.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(key)
        value = value[part]
    return value


def same_number(value: Any) -> Any:
    """Return parameters in which 1 and 1.0 are the same, since YAML files have both."""
    if isinstance(value, Mapping):
        return {key: same_number(each) for key, each in value.items()}
    if isinstance(value, list):
        return [same_number(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def point_of(changes: Mapping[str, Any]) -> str:
    """Return text that is equal for equal changes, however they are written."""
    return json.dumps(same_number(changes), sort_keys=True)
