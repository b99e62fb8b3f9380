"""Every `-S key=value` of README and docs, and every switch of their tables, is valid."""

import re
from collections.abc import Iterator
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from contradiff.config import read_params
from stages.validate import check

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(file.read_text(encoding="utf-8") for file in FILES if file.name != "log.md")
OVERRIDE = re.compile(r"""-S '?([\w.]+)=([^\s'`]+)""")
SWITCH = re.compile(r"^\| `([\w.]+=[^`]+)`", re.MULTILINE)


def commands() -> Iterator[list[tuple[str, str]]]:
    """The overrides of each code span; a comma makes a grid, as in DVC."""
    without_blocks = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    for span in re.findall(r"`([^`]+)`", without_blocks):
        overrides = OVERRIDE.findall(span)
        grid = [[(key, value) for value in points(values)] for key, values in overrides]
        if overrides:
            yield from (list(point) for point in product(*grid))
    for switch in SWITCH.findall(TEXT):
        yield [(key, value) for key, _, value in (part.partition("=") for part in switch.split())]


def points(values: str) -> list[str]:
    return [values] if values.startswith("[") else values.split(",")


def changed(content: dict[str, Any], overrides: list[tuple[str, str]]) -> dict[str, Any]:
    for key, text in overrides:
        section, _, name = key.rpartition(".")
        place = content[section] if section else content
        assert name in place, f"{key} is no parameter"
        place[name] = YAML(typ="safe").load(StringIO(text))  # pyright: ignore[reportUnknownMemberType]
    return content


@pytest.mark.parametrize("overrides", list(commands()), ids=lambda o: " ".join(map("=".join, o)))
def test_documented_parameters_are_valid(overrides: list[tuple[str, str]]):
    content = changed(read_params(ROOT / "presets/tiny.yaml"), overrides)
    check(content, source="params.yaml")


def test_the_ablations_are_there():
    """Else the patterns above no longer find anything."""
    keys = {key for overrides in commands() for key, _ in overrides}
    assert {"loss.lambda", "lora.rank", "features.pool", "probe.head", "head.block"} <= keys
    assert len(list(commands())) > 25
