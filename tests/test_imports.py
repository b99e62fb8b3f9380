"""contradiff.imports: the seconds of slow imports, and the stages that need none."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from contradiff import imports
from tests.settings import TINY

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "diffusers", "scipy", "sklearn", "torchvision"}


@pytest.fixture
def project(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Path:
    """The embedded default, on the tests' base and images, with a checkpoint in name only."""
    base = TINY["base"] | {"path": str(tiny_base)}
    YAML().dump(TINY | {"base": base}, tmp_path / "params.yaml")
    (tmp_path / "build/pretrain").mkdir(parents=True)
    (tmp_path / "build/pretrain/model.safetensors").write_bytes(b"some weights")
    (tmp_path / "build/shards").symlink_to(tiny_data / "images")
    (tmp_path / "build/latents").symlink_to(tiny_data / "latents")
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "written"),
    [
        ("validate", "build/validated"),
        ("validate --dry-run", "params.yaml"),
        ("conditions", "build/conditions/index.json"),
        ("class_condition", "build/class_condition/config.json"),
    ],
)
def test_stages_that_compute_nothing_import_nothing_heavy(project: Path, stage: str, written: str):
    command = [sys.executable, "-X", "importtime", "-m", *f"stages.{stage}".split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=True, cwd=project, env=environment, capture_output=True, text=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "stages.runtime.run" in imported
    assert sorted(HEAVY & imported) == []
    assert (project / written).is_file()


def test_seconds_of_all_blocks_are_added(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(imports, "_seconds", [])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert imports.seconds_of_slow_imports() == 0
    for _ in range(2):
        with imports.slow_import():
            pass
    assert imports.seconds_of_slow_imports() == pytest.approx(3.5)


def test_the_collector_sleeps_and_wakes_even_after_an_error():
    awake: list[bool] = []

    def fail() -> None:
        with imports.slow_import():
            awake.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert [*awake, gc.isenabled()] == [False, True]
