"""The whole parameter file, checked at once."""

import copy
from pathlib import Path
from typing import Any

import pytest

from contradiff.config import read_params
from stages.validate import check

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def content() -> dict[str, Any]:
    return copy.deepcopy(read_params(ROOT / "presets/tiny.yaml"))


def test_all_faults_are_listed_once(content: dict[str, Any]):
    content["lose"] = {"lambda": 0.1}
    content["seed"] = "zero"
    content["loss"]["lamda"] = 0.5
    content["runtime"]["device"] = "tpu"
    del content["lora"]["rank"]
    with pytest.raises(ValueError, match="unknown") as caught:
        check(content, source="params.yaml")
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["lora.rank", "lose", "loss.lamda", "runtime.device", "seed"]


@pytest.mark.parametrize("section", ["runtime", "seed", "data"])
def test_missing_section_is_named(content: dict[str, Any], section: str):
    del content[section]
    with pytest.raises(ValueError, match=f"params.yaml: {section}: missing"):
        check(content, source="params.yaml")


@pytest.mark.parametrize("value", [None, True, "abc", float("nan"), float("inf")])
def test_what_dvc_lets_pass_is_refused(content: dict[str, Any], value: object):
    """`dvc exp run -S loss.lambda=abc`, and `=null`, `=true`, are nothing to DVC."""
    content["loss"]["lambda"] = value
    with pytest.raises(ValueError, match=r"loss\.lambda"):
        check(content, source="params.yaml")
