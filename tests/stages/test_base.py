"""stages.base: what is refused before weights are fetched or copied."""

from stages.runtime.run import Run

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contradiff.config import parse, read_params
from stages import base

ROOT = Path(__file__).resolve().parents[2]
HUB = {"source": "hub", "path": "somebody/model", "revision": "a" * 40}


@pytest.fixture
def content(tiny_base: Path) -> dict[str, Any]:
    tiny = copy.deepcopy(read_params(ROOT / "presets/tiny.yaml"))
    tiny["base"]["path"] = str(tiny_base)
    return tiny


@pytest.fixture
def run(run_of: Callable[[str], Run]) -> Run:
    return run_of("base")


@pytest.fixture
def served(tiny_base: Path) -> list[Path]:
    """The folder that the hub serves is the last."""
    return [tiny_base]


@pytest.fixture
def fetched(served: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub; the names of the files that were asked of it."""
    names: list[str] = []

    def snapshot_download(
        name: str, *, revision: str, allow_patterns: list[str], local_dir: Path
    ) -> None:
        assert (name, revision) == (HUB["path"], HUB["revision"])
        for pattern in allow_patterns:
            for path in served[-1].glob(pattern):
                target = Path(local_dir) / path.relative_to(served[-1])
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
                names.append(str(path.relative_to(served[-1])))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return names


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_local_base_is_copied(content: dict[str, Any], tiny_base: Path, run: Run):
    base.main(parse(base.Params, content, source="params.yaml"), run)
    assert files(Path("build/base")) == files(tiny_base)


def test_a_base_is_fetched_whole(
    content: dict[str, Any], tiny_base: Path, run: Run, fetched: list[str]
):
    base.main(parse(base.Params, content | {"base": HUB}, source="params.yaml"), run)
    assert files(Path("build/base")) == set(fetched) == files(tiny_base)


def test_what_cannot_be_used_is_refused_before_weights(
    content: dict[str, Any], run: Run, served: list[Path], fetched: list[str], tmp_path: Path
):
    (tiny_base,) = served
    scheduler = json.loads((tiny_base / "scheduler/scheduler_config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    scheduler["prediction_type"] = "v_prediction"
    (other / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    served.append(other)
    for section in (content["base"] | {"path": str(other)}, HUB):
        params = parse(base.Params, content | {"base": section}, source="params.yaml")
        with pytest.raises(ValueError, match=r"^base\.path: .*v_prediction"):
            base.main(params, run)
    assert not Path("build/base").exists()
    assert [path for path in fetched if path.endswith(".safetensors")] == []
