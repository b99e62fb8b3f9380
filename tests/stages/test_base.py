"""stages.base: what is refused before weights are fetched or copied."""

from stages.runtime.run import Run

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from contradiff.base.config import WEIGHTS_NAME, BaseParams, base_manifest
from stages import base

HUB = BaseParams(source="hub", path="somebody/model", revision="a" * 40)


@pytest.fixture
def run(run_of: Callable[[str], Run]) -> Run:
    return run_of("base")


@pytest.fixture
def fetched(tiny_base: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that serves `other`, if it is there, or else the tests' base; what was asked of it."""
    names: list[str] = []

    def snapshot_download(
        name: str, *, revision: str, allow_patterns: list[str], local_dir: Path
    ) -> None:
        assert (name, revision) == (HUB.path, HUB.revision)
        served = run.root / "other" if (run.root / "other").exists() else tiny_base
        for pattern in allow_patterns:
            for path in served.glob(pattern):
                names.append(str(path.relative_to(served)))
                (local_dir / names[-1]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local_dir / names[-1])

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
    tiny_base: Path, run: Run, fetched: list[str]
):
    other = Path(shutil.copytree(tiny_base, run.root / "other"))
    scheduler = other / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"sample"'))
    for params in (local(other), HUB):
        with pytest.raises(ValueError, match=r"^base\.path: .*'sample'"):
            base.main(base.Params(base=params), run)
    assert not Path("build/base").exists()
    assert [path for path in fetched if path.endswith(".safetensors")] == []


def test_weights_that_are_not_finite_are_refused(tiny_base: Path, run: Run):
    other = Path(shutil.copytree(tiny_base, run.root / "other"))
    weights = other / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\xff\xff\xff\x7f")  # NaN
    with pytest.raises(ValueError, match=r"^base\.path: .* has NaN or infinite values"):
        base.main(base.Params(base=local(other)), run)
    assert not Path("build/base").exists()


def test_a_hub_that_cannot_be_reached_is_said(run: Run):
    """The tests have no network."""
    with pytest.raises(
        ConnectionError, match=r"^base\.path: somebody/model .* set base\.source to"
    ):
        base.main(base.Params(base=HUB), run)


@pytest.mark.parametrize("was_prepared", [False, True])
def test_weights_that_prepare_has_not_seen_are_compared_with_their_configuration(
    tiny_base: Path, run: Run, *, was_prepared: bool
):
    other = run.root / "other"
    shutil.copytree(tiny_base, other)
    params = base.Params(base=local(other))
    if was_prepared:
        base.MANIFEST.parent.mkdir(parents=True)
        base.MANIFEST.write_text(json.dumps(base_manifest(params.base, root=run.root)))
    base.main(params, run)
    path = other / "unet" / WEIGHTS_NAME
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors are missing, such as conv_in\.weight"):
        base.main(params, run)


def test_weights_that_prepare_has_seen_are_not_compared_again(
    tiny_base: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    params = base.Params(base=local(tiny_base))
    base.MANIFEST.parent.mkdir(parents=True)
    base.MANIFEST.write_text(json.dumps(base_manifest(params.base, root=run.root)))
    monkeypatch.setattr(base, "check_weights", None)
    base.main(params, run)
