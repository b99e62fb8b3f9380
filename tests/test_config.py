"""Messages for wrong parameter files."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from contradiff.config import Section, parse, parse_exactly, read_params


class Loss(Section):
    weight: float = Field(alias="lambda", ge=0)
    kind: Literal["ntxent", "infonce"]
    levels: list[int]


class Train(Section):
    lr: float
    epochs: int = Field(ge=1)
    warmup_epochs: int = Field(ge=0)

    @model_validator(mode="after")
    def _warmup_ends(self) -> "Train":
        if self.warmup_epochs >= self.epochs:
            raise ValueError("train.warmup_epochs must be less than train.epochs")
        return self


class Params(Section):
    seed: int
    loss: Loss
    train: Train


VALID: dict[str, Any] = {
    "seed": 0,
    "loss": {"lambda": 0.1, "kind": "ntxent", "levels": [3, 2, 1]},
    "train": {"lr": 0.1, "epochs": 2, "warmup_epochs": 1},
}


def changed(section: str, **values: object) -> dict[str, Any]:
    return VALID | {section: VALID[section] | values}


def complaint(content: dict[str, Any], schema: type[Section] = Params) -> str:
    with pytest.raises(ValueError, match=r"params\.yaml") as caught:
        parse(schema, content, source="params.yaml")
    return str(caught.value)


def test_valid_values_come_through_and_whole_numbers_are_floats():
    params = parse(Params, VALID, source="params.yaml")
    assert params.loss.weight == 0.1
    assert params.model_dump(by_alias=True) == VALID
    weight = parse(Params, changed("loss", **{"lambda": 0}), source="").loss.weight
    assert (weight, type(weight)) == (0.0, float)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lr", value) for value in (True, "0.1", float("nan"), float("inf"), None)),
        *(("epochs", value) for value in (2.0, "2", True, 0)),
    ],
)
def test_wrong_value_is_named_and_shown(key: str, value: object):
    message = complaint(changed("train", **{key: value}))
    assert message.startswith(f"params.yaml: train.{key}: ")
    assert message.endswith(f"(got {value!r})")
    assert "\n" not in message


def test_every_fault_has_its_line_with_the_key_as_in_the_file():
    content = {"seed": "0", "loss": {"lambda": -1.0, "levels": [3, "2"], "lamda": 1}}
    faults = [line.split(": ", 2)[1:] for line in complaint(content).splitlines()]
    assert [(key, text.split(";")[0].rpartition(" ")[2]) for key, text in faults] == [
        *(("seed", "'0')"), ("loss.lambda", "-1.0)"), ("loss.kind", "missing")),
        *(("loss.levels.1", "'2')"), ("loss.lamda", "key"), ("train", "missing")),
    ]


def test_contradiction_names_both_keys():
    message = complaint(changed("train", warmup_epochs=2))
    assert message == "params.yaml: train.warmup_epochs must be less than train.epochs"


def test_sections_of_other_stages_are_no_fault_of_this_one():
    parse(Params, VALID | {"other": {"x": 1}}, source="params.yaml")
    with pytest.raises(ValueError, match=r"params.yaml: other: unknown key"):
        parse_exactly(Params, VALID | {"other": {"x": 1}}, source="params.yaml")


class OneKey(Section):
    kind: Literal["ntxent", "infonce"] = Field(alias="loss.kind")


def test_a_stage_may_depend_on_one_key_of_a_section():
    """A stage does so by `params: [loss.kind]` in dvc.yaml."""
    assert parse(OneKey, VALID, source="params.yaml").kind == "ntxent"
    assert complaint(changed("loss", kind="l2"), OneKey).endswith("(got 'l2')")
    for content in ({}, {"loss": {}}, {"loss": 1}):
        assert complaint(content, OneKey).startswith("params.yaml: loss.kind: missing")


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text("a: [1e-05, 1.0e-05, 0.00001, 1E-5]\nb: [no, on, 010]\n")
    assert read_params(path) == {"a": [1e-5] * 4, "b": ["no", "on", 10]}


def test_what_dvc_sets_is_read_as_it_was_meant(tmp_path: Path):
    """`dvc exp run -S train.lr=0.00001` writes the file with DVC's serializer."""
    from dvc.utils.serialize import modify_yaml

    path = tmp_path / "params.yaml"
    path.write_text("train: {lr: 0.1}\n")
    with modify_yaml(str(path)) as content:
        content["train"]["lr"] = 0.00001
    assert "e" in path.read_text().split(":")[-1]
    assert read_params(path) == {"train": {"lr": 1e-05}}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: [1\n", "not valid YAML"),
        ("- a\n", "expected a mapping of sections, found list"),
        ("", "expected a mapping of sections, found NoneType"),
    ],
)
def test_an_unreadable_or_missing_file_is_named(tmp_path: Path, text: str, fault: str):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: (?s:.*){fault}"):
        read_params(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"params.yaml: no such file"):
        read_params(path)
