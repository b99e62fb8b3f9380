"""A result is a member's if its parameters are, and if dvc.lock says that its stages ran so."""

import json
from pathlib import Path
from typing import Any

import pytest

from contradiff.studies import collecting
from contradiff.studies.collecting import Collection, base_differences, collect
from contradiff.studies.experiments import list_experiments, read_result
from contradiff.studies.members import members_of
from contradiff.studies.store import Store, read_store, write_store
from contradiff.studies.study import read_study
from tests.studies.project import PARAMS, add_experiment, params


@pytest.fixture(autouse=True)
def _code(monkeypatch: pytest.MonkeyPatch, dvc: Path) -> None:  # noqa: ARG001
    """The experiments' code is the present code, as their dvc.lock has it."""
    monkeypatch.setattr(collecting, "hashes_of", lambda _root, paths: dict.fromkeys(paths, "code"))


def look(project: Path, base: dict[str, Any] = PARAMS, store: Store | None = None) -> Collection:
    study = read_study(project, "lambdas")
    return collect(project, study, members_of(study, "lambdas", base), store or Store())


def states(found: Collection) -> list[str]:
    return [each.state for each in found.standings]


def test_names_do_not_matter(project: Path):
    add_experiment(project, "lambdas-lambda0-seed0", params(seed=7))
    add_experiment(project, "funny-name", params(seed=1, loss={"lambda": 0.0}), top1=0.75)
    found = look(project)
    assert states(found) == ["missing", "missing", "done", "missing"]
    [record] = found.store.records
    assert (record.changes, record.seed) == ({"loss.lambda": 0}, 1)
    assert record.metrics["probe.top1"] == 0.75
    assert record.experiment.startswith("funny-name (")
    steps = record.curve["step"]
    assert len(steps) == 32
    assert steps[:2] == [1.5, 3.5]
    assert record.curve["loss"][0] == 0.75
    assert "contrastive" not in record.curve


def test_a_result_has_the_seconds_that_its_stages_noted(project: Path):
    add_experiment(project, "mine", params())
    for name, seed, seconds in (("a", 0, 4.5), ("b", 1, 60.0)):
        note = {"stage": "probe", "params": {"seed": seed}, "ended": 1.0, "seconds": seconds}
        path = project / f".work/times/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note))
    [record] = look(project).store.records
    assert record.seconds == {"probe": 4.5}


@pytest.mark.parametrize(
    ("lock", "fault"),
    [
        ({}, None),
        ({"score/gone": None}, "metrics/score.json is not what the stage score wrote"),
        ({"pretrain/params/loss": {"lambda": 0.2}}, "pretrain has not run with these parameters"),
        ({"shard/params/seed": 3}, "shard has not run with these parameters (seed)"),
        ({"probe/deps/0": "old"}, "probe has not run on this build/pretrain"),
        ({"shard/outs/0": "new"}, "pretrain has not run on this build/shards"),
        ({"probe/outs/0": "old"}, "metrics/probe.json is not what the stage probe wrote"),
    ],
)
def test_an_unfinished_experiment_is_no_result(
    lock: dict[str, Any], fault: str | None, project: Path
):
    add_experiment(project, "half", params(), lock=lock)
    [experiment] = list_experiments(project)
    found = read_result(project, experiment, stages=["probe", "score"])
    assert isinstance(found, str) == (fault is not None)
    if fault:
        assert fault in str(found)
        standing = look(project).standings[1]
        assert standing.state == "missing"
        assert standing.note == f"half is no result: {found}"


def test_other_code_is_told(project: Path):
    add_experiment(project, "old", params(), code="older")
    found = look(project)
    assert states(found)[1] == "other code"
    assert "code/data, code/method, code/probe.py, code/score.py" in found.standings[1].note


def test_other_measures_and_second_runs_are_set_aside(project: Path):
    add_experiment(project, "first", params(), time=1_700_000_001)
    add_experiment(project, "same", params(), time=1_700_000_002)
    add_experiment(project, "second", params(), top1=0.7, time=1_700_000_003)
    add_experiment(project, "few", params(generate={"num_samples": 10}))
    add_experiment(project, "unrelated", params(loss={"lambda": 5}))
    found = look(project)
    assert [each.experiment.split()[0] for each in found.store.records] == ["first"]
    told = {each.experiment.split()[0]: each.why for each in found.store.aside}
    assert told == {
        "second": f"a second run with other scores; {found.store.records[0].experiment} came first",
        "few": "measured otherwise: generate.num_samples 10 instead of 1000",
    }


def test_the_store_outlives_the_experiments(project: Path):
    add_experiment(project, "a", params())
    write_store(project, "lambdas", look(project).store)
    text = (project / "studies/results/lambdas.json").read_text()
    kept = read_store(project, "lambdas")
    for reference in (project / ".git/refs/exps").rglob("a"):
        reference.unlink()
    found = look(project, store=kept)
    assert states(found)[1] == "done"
    write_store(project, "lambdas", found.store)
    assert (project / "studies/results/lambdas.json").read_text() == text
    other = params(probe={"lr": 0.1})
    study = read_study(project, "lambdas")
    assert states(look(project, other, kept)) == ["missing"] * 4
    members = members_of(study, "lambdas", other)
    assert base_differences(kept, members) == ["probe.lr: 0.3, now 0.1"]


def test_a_damaged_store_is_named(project: Path):
    path = project / "studies/results/lambdas.json"
    path.parent.mkdir()
    path.write_text('{"records": [1]}')
    with pytest.raises(ValueError, match=r"studies/results/lambdas\.json: records\.0: .*checkout"):
        read_store(project, "lambdas")
