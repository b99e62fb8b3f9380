"""Every `-S key=value` and every parameter in a table of README and docs is valid."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from contradiff.config import read_params
from stages.validate import check
from tests.settings import override

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(
    file.read_text(encoding="utf-8") for file in FILES if file.stem not in {"log", "extending"}
)
OVERRIDE = re.compile(r"""-S '?([\w.]+)=([^\s'`]+)""")
SWITCH = re.compile(r"^\| `([\w.]+=[^`]+)`", re.MULTILINE)


def commands() -> Iterator[str]:
    """Yield the overrides of each code span. A comma separates several values, as in DVC."""
    without_blocks = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    for span in re.findall(r"`([^`]+)`", without_blocks):
        overrides = OVERRIDE.findall(span)
        grid = [[f"{key}={value}" for value in points(values)] for key, values in overrides]
        if overrides:
            yield from map(" ".join, product(*grid))
    yield from SWITCH.findall(TEXT)


def points(values: str) -> list[str]:
    return [values] if values.startswith("[") else values.split(",")


@pytest.mark.parametrize("overrides", list(commands()))
def test_documented_parameters_are_valid(overrides: str):
    content = read_params(ROOT / "presets/tiny.yaml")
    override(content, overrides)
    check(content, source="params.yaml")


def test_the_ablations_are_there():
    """If this fails, the patterns above find nothing any more."""
    found = list(commands())
    keys = {change.partition("=")[0] for overrides in found for change in overrides.split()}
    assert {"loss.lambda", "lora.rank", "features.pool", "probe.head", "head.block"} <= keys
    assert len(found) > 25
