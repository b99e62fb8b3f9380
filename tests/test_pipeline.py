"""dvc.yaml says the truth about the stages: DVC sees neither imports nor what a stage reads."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest

from contradiff.config import Section, read_params
from stages.validate import STAGES, check

ROOT = Path(__file__).resolve().parents[1]
PIPELINE: dict[str, dict[str, Any]] = read_params(ROOT / "dvc.yaml")["stages"]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))

each_stage = pytest.mark.parametrize("stage", list(PIPELINE))


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("contradiff", "stages", exclude_type_checking_imports=True)


def file_of(module: str) -> Path:
    return Path(*module.split(".")).with_suffix(".py")


def paths(entries: list[str | dict[str, Any]]) -> list[str]:
    """DVC writes an out as `path` or `path: {options}`."""
    return [name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)]


def outs(stage: str) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        yield from paths(PIPELINE[stage].get(kind, []))


def is_within(path: str, outs: set[str]) -> bool:
    return any(str(place) in outs for place in (Path(path), *Path(path).parents))


NEVER_A_RESULT = ("stages/runtime", "contradiff/report", "contradiff/config.py")
NEVER_A_RESULT += ("contradiff/types.py", "contradiff/files.py")
"""Code that no stage's result depends on: messages, reports, the reading and writing of files."""


@each_stage
def test_rooms_are_those_that_the_stage_imports(stage: str, graph: grimp.ImportGraph):
    """DVC does not follow imports: a room that is missing leaves the stage "up to date"."""
    modules = graph.find_upstream_modules(f"stages.{stage}") | {f"stages.{stage}"}
    files = [path for name in modules if (ROOT / (path := file_of(name))).is_file()]
    code = [dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("contradiff", "stages"))]
    uncovered = [str(path) for path in files if not is_within(str(path), {*code, *NEVER_A_RESULT})]
    assert uncovered == []
    idle = [dep for dep in code if not any(is_within(str(path), {dep}) for path in files)]
    assert idle == []


def test_messages_and_reports_invalidate_no_result():
    """`validate` has a constant out, `report` is the report."""
    touched = {
        stage
        for stage, content in PIPELINE.items()
        for dep in content["deps"]
        if any(is_within(place, {dep}) for place in NEVER_A_RESULT)
    }
    assert touched == {"validate", "report"}


@each_stage
def test_parameters_are_the_fields_of_the_stage(stage: str):
    params = PIPELINE[stage].get("params", [])
    if stage == "validate":
        assert params == [{"params.yaml": None}]  # the whole file
        return
    schema: type[Section] = importlib.import_module(f"stages.{stage}").Params
    fields = [field.alias or name for name, field in schema.model_fields.items()]
    assert sorted(params) == sorted(fields)


def test_validation_knows_every_stage():
    assert [schema.__module__ for schema in STAGES] == [
        f"stages.{name}" for name in PIPELINE if name != "validate"
    ]


@each_stage
def test_every_stage_runs_its_own_module(stage: str):
    assert PIPELINE[stage]["cmd"] == f"python -m stages.{stage}"


def test_runtime_is_no_dependency():
    """What changes no result may not invalidate one."""
    assert [name for name in PIPELINE if "runtime" in str(PIPELINE[name].get("params"))] == []


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_is_valid(preset: Path):
    check(read_params(preset), source=preset.name)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_has_the_same_sections_in_the_same_order(preset: Path):
    assert list(read_params(preset)) == list(read_params(ROOT / "presets/tiny.yaml"))


def test_no_out_is_written_twice_or_lies_in_another():
    every = [Path(out) for stage in PIPELINE for out in outs(stage)]
    assert len(set(every)) == len(every)
    assert [str(out) for out in every if set(out.parents) & set(every)] == []


def test_every_built_dependency_is_some_stage_s_out():
    every = {out for stage in PIPELINE for out in outs(stage)}
    unmade = [
        f"{stage}: {dep}"
        for stage in PIPELINE
        for dep in PIPELINE[stage].get("deps", [])
        if dep.startswith(("build/", "metrics/")) and not is_within(dep, every)
    ]
    assert unmade == []


def test_no_out_outlives_its_parameters():
    """A persisted checkpoint survives changed parameters, and a training then ends at once."""
    assert "persist" not in (ROOT / "dvc.yaml").read_text(encoding="utf-8")


def test_every_stage_waits_for_validation():
    """Except for frozen ones, which `dvc repro` never runs."""
    thawed = {name for name in PIPELINE if not PIPELINE[name].get("frozen")}
    waiting = {"validate"}
    for _ in thawed:
        made = {out for name in waiting for out in outs(name)}
        waiting |= {
            name
            for name in thawed
            if any(is_within(dep, made) for dep in PIPELINE[name].get("deps", []))
        }
    assert thawed - waiting == set()


def test_stages_that_always_run_are_those_whose_input_is_outside_dvc():
    """Prepare looks at the raw data, track writes to MLflow."""
    always = [name for name, stage in PIPELINE.items() if stage.get("always_changed")]
    assert always == ["prepare", "track"]
