"""A run's page names a command that gives its parameters, and the code that really ran."""

from stages.runtime.origin import code_of_run, command_of, describe_machine

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from contradiff.config import read_params

PRESET: dict[str, Any] = {
    "seed": 0,
    "loss": {"lambda": 0.1, "contrastive": "ntxent"},
    "data": {"root": "data/raw/toy", "num_train": 4000},
    "probe": {"cs": [0.01, 0.1], "verify": False},
    "runtime": {"device": "auto"},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a preset, parameters and code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_EXP_BASELINE_REV", raising=False)
    for name in ("presets", "stages"):
        (tmp_path / name).mkdir()
    YAML().dump(PRESET, tmp_path / "presets/tiny.yaml")
    YAML().dump(PRESET | {"seed": 7, "data": {}}, tmp_path / "presets/other.yaml")
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "stages/pretrain.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e@e", "commit", "-qm", "all")
    return tmp_path


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, "dvc repro"),
        ({"runtime": {"device": "cpu"}}, "dvc repro"),
        ({"loss": {"lambda": 0, "contrastive": "dcl"}}, "dvc exp run -S loss.lambda=0 -S loss."),
        ({"data": {"root": "my images/a b", "num_train": None}}, "dvc exp run -S 'data.root=my"),
        ({"seed": 3, "probe": {"cs": [1.0, 10.0], "verify": True}}, "dvc exp run -S seed=3 -S "),
    ],
)
def test_the_command_gives_the_parameters(project: Path, changes: dict[str, Any], last: str):
    params = PRESET | changes
    first, second, command = command_of(params).splitlines()
    assert first == f"git checkout {git('rev-parse', 'HEAD')}"
    assert second == "make preset NAME=tiny"
    assert command.startswith(last)
    # DVC itself applies the options to the preset.
    overrides = [word for word in shlex.split(command)[2:] if word not in {"run", "-S"}]
    apply_overrides(project / "presets/tiny.yaml", overrides)
    made = read_params(project / "presets/tiny.yaml")
    assert made | {"runtime": None} == params | {"runtime": None}


def test_without_git_the_command_names_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("DVC_EXP_BASELINE_REV", raising=False)
    assert command_of(PRESET) == "dvc repro"
    assert code_of_run() == "The code was not in a git repository, so no commit names it."


def test_only_changed_code_is_named(project: Path):
    clean = f"The code was that of commit {git('rev-parse', 'HEAD')}"
    (project / "params.yaml").write_text("a: 2\n")
    assert code_of_run() == f"{clean}."
    (project / "stages/pretrain.py").write_text("a = 2\n")
    assert code_of_run() == f"{clean}, but these files had other content: stages/pretrain.py."


def test_the_machine_has_a_processor_and_versions():
    found = describe_machine()
    assert all(found.values())
    assert re.match(r"\d+\.\d+", found["torch"])
