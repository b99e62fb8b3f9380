"""dvc.yaml lists all dependencies of each stage. DVC cannot check this itself."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest

from contradiff.config import Section, read_params
from stages.validate import WholeFile, check

ROOT = Path(__file__).resolve().parents[1]
PIPELINE: dict[str, dict[str, Any]] = read_params(ROOT / "dvc.yaml")["stages"]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))

NEVER_A_RESULT = {
    *("stages/runtime", "contradiff/report", "contradiff/rules.py", "contradiff/processes.py"),
    *("contradiff/config.py", "contradiff/files.py", "contradiff/types.py"),
    *("contradiff/signals.py", "contradiff/watch.py", "contradiff/planning"),
    "contradiff/imports.py",
}
"""Code that changes no stage's result: messages, reports, reading and writing of files."""

each_stage = pytest.mark.parametrize("stage", list(PIPELINE))


def paths(entries: list[str | dict[str, Any]]) -> list[str]:
    """Return the paths of `entries`. DVC writes an entry as `path` or as `path: {options}`."""
    return [name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)]


def outs(stage: str) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        yield from paths(PIPELINE[stage].get(kind, []))


def is_within(path: str, places: set[str]) -> bool:
    return any(str(place) in places for place in (Path(path), *Path(path).parents))


def followers(stages: set[str]) -> set[str]:
    """Return `stages` and all stages that use their outs directly or indirectly."""
    found = set(stages)
    while True:
        made = {out for name in found for out in outs(name)}
        users = ((name, stage.get("deps", [])) for name, stage in PIPELINE.items())
        more = {name for name, deps in users if any(is_within(dep, made) for dep in deps)}
        if more <= found:
            return found
        found |= more


def touched_by(path: str) -> set[str]:
    """Return the stages whose outs a changed file may change, and that DVC runs because of it."""
    deps = {name: set(stage["deps"]) for name, stage in PIPELINE.items()}
    direct = {name for name in PIPELINE if is_within(path, deps[name])}
    return followers(direct - {"validate", "prepare", "pretrain_base"})


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("contradiff", "stages", exclude_type_checking_imports=True)


@each_stage
def test_rooms_are_those_that_the_stage_imports(stage: str, graph: grimp.ImportGraph):
    """DVC does not see imports. If a folder is not listed, its changes do not rerun the stage."""
    modules = graph.find_upstream_modules(f"stages.{stage}") | {f"stages.{stage}"}
    named = [f"{name.replace('.', '/')}.py" for name in modules]
    files = [path for path in named if (ROOT / path).is_file()]
    code = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("contradiff", "stages"))}
    assert [path for path in files if not is_within(path, code | NEVER_A_RESULT)] == []
    assert [dep for dep in code if not any(is_within(path, {dep}) for path in files)] == []


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        *((path, []) for path in sorted(NEVER_A_RESULT - {"contradiff/report"})),
        ("contradiff/toy", []),  # the manifest of prepare lists the rendered images
        ("contradiff/report", ["report", "track"]),
        ("contradiff/evaluation", ["extractor", "reference", "report", "score", "track"]),
        (
            "contradiff/downstream",
            ["baselines", "probe", "report", "separability", "track", "transfer"],
        ),
    ],
)
def test_a_message_invalidates_no_result_and_a_late_room_its_own_alone(
    path: str, stages: list[str]
):
    assert sorted(touched_by(path)) == stages


def test_the_method_invalidates_training_and_no_data():
    touched = touched_by("contradiff/method")
    assert touched >= followers({"pretrain"}) > {"probe"}
    assert "baselines" not in followers({"pretrain"})  # a λ sweep computes them once
    assert touched.isdisjoint({"shard", "base", "latents", "extractor", "reference"})


@each_stage
def test_parameters_are_the_fields_of_the_stage(stage: str):
    """`validate` checks the same sections."""
    assert PIPELINE[stage]["cmd"] == f"python -m stages.{stage}"
    params = PIPELINE[stage].get("params", [])
    if stage == "validate":
        assert params == [{"params.yaml": None}]  # the complete file
        return
    schema: type[Section] = importlib.import_module(f"stages.{stage}").Params
    fields = {field.alias or name: field for name, field in schema.model_fields.items()}
    assert sorted(params) == sorted(fields)
    for name, field in fields.items():
        section, _, key = name.partition(".")
        whole = WholeFile.model_fields[section]
        if key:
            assert key in whole.annotation.model_fields
        else:
            assert field.annotation == whole.annotation


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_is_valid_and_its_sections_have_the_same_order(preset: Path):
    content = read_params(preset)
    check(content, source=preset.name)
    assert list(content) == list(read_params(ROOT / "presets/tiny.yaml"))


def test_every_out_is_written_once_and_every_built_dependency_is_one():
    every = [Path(out) for stage in PIPELINE for out in outs(stage)]
    assert len(set(every)) == len(every)
    assert [str(out) for out in every if set(out.parents) & set(every)] == []
    needed = {dep for stage in PIPELINE.values() for dep in stage.get("deps", [])}
    built = {dep for dep in needed if dep.startswith(("build/", "metrics/"))}
    assert [dep for dep in built if not is_within(dep, {str(out) for out in every})] == []


def test_dvc_shows_few_numbers_and_the_trained_model():
    """`dvc exp show` has a column for each number in a metric, before all parameters."""
    metrics = {
        stage: paths(entry["metrics"]) for stage, entry in PIPELINE.items() if "metrics" in entry
    }
    assert metrics == {"report": ["metrics/headline.json"]}
    [model] = read_params(ROOT / "dvc.yaml")["artifacts"].values()
    assert (model["path"], model["type"]) == ("build/pretrain", "model")


def test_no_out_outlives_its_parameters():
    """Persisted outs would survive changed parameters, and a training would then end at once."""
    assert "persist" not in (ROOT / "dvc.yaml").read_text(encoding="utf-8")


def test_every_stage_waits_for_validation_and_those_with_input_outside_dvc_always_run():
    """Frozen stages are excepted, because `dvc repro` never runs them."""
    thawed = {name for name in PIPELINE if not PIPELINE[name].get("frozen")}
    assert thawed <= followers({"validate"})
    always = [name for name, stage in PIPELINE.items() if stage.get("always_changed")]
    assert always == ["prepare", "track"]  # raw data; MLflow


def test_the_shipped_base_names_no_folder_of_another_machine():
    """Diffusers writes `_name_or_path` if a model that was loaded from a folder is saved again."""
    [out] = read_params(ROOT / "dvc.lock")["stages"]["pretrain_base"]["outs"]

    def stored(md5: str) -> Path:
        return ROOT / "artifacts/files/md5" / md5[:2] / md5[2:]

    if not stored(out["md5"]).is_file():
        pytest.skip("the store does not have the base that dvc.lock names")
    files = json.loads(stored(out["md5"]).read_text())
    configs = [stored(file["md5"]) for file in files if file["relpath"].endswith(".json")]
    assert len(configs) == 3
    assert [path for path in configs if "_name_or_path" in path.read_text()] == []
