"""stages.base: what is refused before weights are fetched or copied."""

from stages.runtime.run import Run

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from contradiff.base.config import BaseParams
from stages import base

HUB = BaseParams(source="hub", path="somebody/model", revision="a" * 40)


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
        assert (name, revision) == (HUB.path, HUB.revision)
        for pattern in allow_patterns:
            for path in served[-1].glob(pattern):
                target = Path(local_dir) / path.relative_to(served[-1])
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
                names.append(str(path.relative_to(served[-1])))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return names


def local(folder: Path) -> BaseParams:
    return BaseParams(source="local", path=str(folder), revision=None)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_local_base_is_copied_and_a_hub_s_is_fetched(
    tiny_base: Path, run: Run, fetched: list[str]
):
    base.main(base.Params(base=local(tiny_base)), run)
    assert files(Path("build/base")) == files(tiny_base)
    base.main(base.Params(base=HUB), run)
    assert files(Path("build/base")) == set(fetched) == files(tiny_base)


def test_what_cannot_be_used_is_refused_before_weights(
    tiny_base: Path, run: Run, served: list[Path], fetched: list[str], tmp_path: Path
):
    scheduler = json.loads((tiny_base / "scheduler/scheduler_config.json").read_text())
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    scheduler["prediction_type"] = "v_prediction"
    (other / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    served.append(other)
    for params in (local(other), HUB):
        with pytest.raises(ValueError, match=r"^base\.path: .*v_prediction"):
            base.main(base.Params(base=params), run)
    assert not Path("build/base").exists()
    assert [path for path in fetched if path.endswith(".safetensors")] == []


def test_a_hub_that_cannot_be_reached_is_said(run: Run):
    """The tests have no network."""
    with pytest.raises(ConnectionError, match=r"^base\.path: somebody/model .* base\.source: loca"):
        base.main(base.Params(base=HUB), run)
