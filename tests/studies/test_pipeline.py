"""Graphs of stages, the work that experiments share, and the order in which they run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from contradiff.studies.members import members_of
from contradiff.studies.pipeline import Graph, hashes_of
from contradiff.studies.planning import hours_of, ordered, seconds_of
from contradiff.studies.store import Record
from contradiff.studies.study import Study, read_study
from tests.studies.project import PARAMS, params

ROOT = Path(__file__).resolve().parents[2]
COLUMN = {"title": "top-1", "format": ".1%", "better": "up"}


def test_code_is_what_no_stage_writes(project: Path):
    graph = Graph.read(project)
    assert graph.upstream(["probe"]) == ["shard", "pretrain", "probe"]
    assert graph.code(["probe"]) == ["code/data", "code/method", "code/probe.py"]
    assert graph.maker("build/shards/index.json") == "shard"


def test_the_real_pipeline_is_understood():
    graph = Graph.read(ROOT)
    code = graph.code(["score"])
    assert "contradiff/evaluation" in code
    assert all(path.startswith(("contradiff/", "stages/")) for path in code)
    assert not any("downstream" in path or "report" in path for path in code)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["prob"]}, "targets: dvc.yaml has no stage prob"),
        ({"targets": ["probe"]}, "columns: score.fid: the targets do not run it; add score to"),
        ({"columns": {"top1": COLUMN | {"key": "prob.top1"}}}, "prob.top1: dvc.yaml has no stage"),
    ],
)
def test_a_study_asks_for_stages_that_run(changes: dict[str, Any], message: str, project: Path):
    study, graph = read_study(project, "lambdas"), Graph.read(project)
    graph.check(study, "lambdas")
    faulty = Study.model_validate(
        study.model_dump()
        | {"curve": [], "rows": [{"title": "a", "set": {}}], "baseline": None}
        | changes
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        graph.check(faulty, "lambdas")


def test_a_folders_hash_is_dvcs(tmp_path: Path):
    """The hash that DVC 3.67 gives to a folder with a/b = "1" and c = "2"."""
    (tmp_path / "x/a/__pycache__").mkdir(parents=True)
    (tmp_path / "x/a/b").write_text("1")
    (tmp_path / "x/c").write_text("2")
    (tmp_path / "x/a/__pycache__/b.pyc").write_text("ignored")
    expected = "9d9726ee7000cb7415c9e39fa1e7a48d.dir"
    assert hashes_of(tmp_path, ["x", "gone"]) == {"x": expected}


def test_work_is_shared_where_parameters_are(project: Path):
    graph = Graph.read(project)
    own = graph.signatures(PARAMS)
    weighted = graph.signatures(params(loss={"lambda": 1}))
    assert {name for name in own if own[name] != weighted[name]} == {"pretrain", "probe", "score"}
    assert graph.signatures(params(runtime={"device": "cuda"})) == own


def test_members_that_unlock_work_come_first(project: Path):
    members = members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    found = ordered(members, Graph.read(project), [])
    assert [(member.changes["loss.lambda"], member.seed) for member in found] == [
        *((0, 0), (0, 1), (0.1, 0), (0.1, 1))
    ]


def test_hours_leave_out_work_that_the_cache_has(project: Path):
    members = members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    graph = Graph.read(project)
    times = [{"shard": 3600.0, "pretrain": 7200.0}, {"pretrain": 14400.0, "probe": 360.0}]
    records = [record(seconds) for seconds in times]
    seconds = seconds_of([], records, members)
    found = hours_of(members, seconds, graph, [], [])
    # Medians: 1 h for shards, once a seed; 3 h for the training; 0.1 h for the probe.
    assert [round(each, 6) for each in found.by_member] == [4.1, 3.1, 4.1, 3.1]
    assert found.unmeasured == ["score"]
    assert hours_of(members[1:2], seconds, graph, ["probe"], members[:1]).by_member == [3.1]


def test_notes_count_if_only_what_the_study_changes_differs(project: Path):
    members = members_of(read_study(project, "lambdas"), "lambdas", PARAMS)
    notes = [
        {"stage": stage, "params": values, "seconds": seconds}
        for stage, values, seconds in (
            ("pretrain", {"seed": 7, "loss.lambda": 5}, 100.0),
            ("pretrain", {"seed": 0, "loss.lambda": 0}, 300.0),
            ("probe", {"seed": 0, "probe.lr": 0.3}, 10.0),
            ("probe", {"seed": 0, "probe.lr": 0.5}, 9999.0),
            ("score", {"generate.num_samples": 50_000}, 9999.0),
        )
    ]
    results = [record({"probe": 9999.0, "score": 20.0})]
    assert seconds_of(notes, results, members) == {"pretrain": 200.0, "probe": 10.0, "score": 20.0}


def record(seconds: dict[str, float]) -> Record:
    text = json.dumps({"changes": {}, "seed": 0, "metrics": {}, "curve": {}, "seconds": seconds})
    names = dict.fromkeys(("digest", "base", "code", "revision", "experiment"), "")
    return Record.model_validate(json.loads(text) | names | {"time": 0})
