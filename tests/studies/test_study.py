"""The shipped studies are valid, and faulty ones are refused by their fault."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from contradiff.config import read_params
from contradiff.studies.members import members_of
from contradiff.studies.pipeline import Graph
from contradiff.studies.study import read_study, study_names
from stages.validate import check
from tests.studies.project import STUDY

ROOT = Path(__file__).resolve().parents[2]
NAMES = study_names(ROOT)


@pytest.mark.parametrize("name", NAMES)
def test_members_of_shipped_studies_are_valid(name: str):
    study = read_study(ROOT, name)
    members = members_of(study, name, read_params(ROOT / "presets/tiny.yaml"))
    assert len(members) >= len(study.seeds)
    for member in members:
        check(member.params, source=member.name)
    Graph.read(ROOT).check(study, name)


def test_the_papers_tables_are_there():
    assert {*(f"table{number}" for number in range(3, 10)), "ranks", "views"} <= set(NAMES)
    weights = [0, 0.001, 0.01, 0.1, 1]
    rows = read_study(ROOT, "table8").rows
    assert [row.set for row in rows] == [{"loss.lambda": weight} for weight in weights]
    printed = [(row.paper["fid"], row.paper["top1"]) for row in rows]
    assert printed == [
        *(("14.71", "78.0"), ("12.32", "79.7"), ("7.80", "80.2"), ("5.56", "80.1")),
        ("5.45", "78.3"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "lambdas.yaml: colour: unknown key; see studies/table8.yaml"),
        ({"question": None}, "lambdas.yaml: question: Input should be a valid string"),
        ({"seeds": [0, 0]}, "repeated seed 0"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        (
            {"rows": [{"title": "a", "set": {}}, {"title": "b", "set": {}}]},
            'row "b": repeats the point of row "a"',
        ),
        ({"rows": [{"title": "a", "set": {}}, {"title": "a", "set": None}]}, "repeated title a"),
        ({"rows": [{"title": "a", "set": {"seed": 1}}]}, 'row "a": seed is not for `set`'),
        ({"rows": [{"title": "a", "set": {}, "read": {"is": "a.b"}}]}, '"is" is no column'),
        ({"baseline": "another method"}, "no row with `set` has the title"),
        ({"curve": ["kid"]}, 'curve: "kid" is no column'),
    ],
)
def test_a_faulty_study_is_refused(changes: dict[str, Any], message: str, project: Path):
    content = YAML(typ="safe").load(STUDY) | {"baseline": None} | changes
    with (project / "studies/lambdas.yaml").open("w") as file:
        YAML().dump(content, file)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_study(project, "lambdas")


def test_an_unknown_study_is_named_with_the_nearest(project: Path):
    with pytest.raises(ValueError, match=r"lamda: no such study; did you mean lambdas\?"):
        read_study(project, "lamda")
