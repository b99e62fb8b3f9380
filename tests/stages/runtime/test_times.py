"""How long stages take, and what belongs to an experiment's row in MLflow."""

from stages.runtime import times
from stages.runtime.labels import study_of
from stages.runtime.run import Run, RuntimeParams
from stages.runtime.times import peak_memory, read_costs, record_costs

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import Field

from contradiff.config import Section

PARAMS = {"seed": 0, "loss": {"weight": 1}, "base": {"path": "http://me:secret@host/x"}}


class Loss(Section):
    weight: float
    lambda_: float = Field(alias="lambda", default=0.5)


class Training(Section):
    seed: int
    loss: Loss


class Sampling(Section):
    path: str = Field(alias="base.path")


def test_the_newest_record_with_the_same_parameters_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = iter(range(10))
    monkeypatch.setattr(times.time, "time", lambda: next(clock))
    assert read_costs(tmp_path, PARAMS) == {}
    loss = Loss(weight=1.0)
    record_costs(tmp_path, "pretrain", Training(seed=0, loss=loss), seconds=3.0)
    record_costs(tmp_path, "pretrain", Training(seed=1, loss=loss), seconds=4.0)
    sampling = Sampling.model_validate({"base.path": "http://me:secret@host/x"})
    for seconds in (5.0, 6.04):
        record_costs(tmp_path, "generate", sampling, seconds=seconds)
    for params, expected in (
        (PARAMS, {"generate": 6.0}),
        (PARAMS | {"loss": {"weight": 1, "lambda": 0.5}}, {"generate": 6.0, "pretrain": 3.0}),
        (PARAMS | {"loss": {"weight": 1, "lambda": 0.5}, "seed": 1, "base": {}}, {"pretrain": 4.0}),
        (PARAMS | {"loss": {"weight": 2, "lambda": 0.5}, "base": {}}, {}),
    ):
        found = read_costs(tmp_path, params)
        assert {stage: record["seconds"] for stage, record in found.items()} == expected
    assert not [file for file in tmp_path.rglob("*.json") if "secret" in file.read_text()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_peak_memory_is_in_bytes():
    status = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in status if line.startswith("VmHWM:")]
    assert peak_memory() == pytest.approx(int(line.split()[1]) * 1024, rel=0.01)


def test_a_run_knows_whether_it_went_on_with_earlier_work(tmp_path: Path):
    """The time of a resumed stage is not the time that it takes."""
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    resumed: list[bool] = []
    for stops in (pytest.raises(ZeroDivisionError), nullcontext(), nullcontext()):
        run = Run("pretrain", tmp_path, runtime)
        with stops as is_stopped, run.work_dir({"seed": 0}, [], state_version=1):
            resumed.append(bool(run.resumed))
            assert is_stopped is None or 1 / 0
    assert resumed == [False, True, False]


@pytest.mark.parametrize(
    ("experiment", "variable", "study"),
    [
        ("table8-lambda0.1-seed0", "", "table8"),
        ("table8-lambda0.1-seed0", "ranks", "table8"),  # one worker may run several studies
        ("table7-labels-a-seed0", "", "table7-labels"),
        ("tiled-bard", "ranks", "ranks"),
        ("tiled-bard", "", None),
        ("", "", None),
    ],
)
def test_the_study_is_the_one_that_names_the_experiment(
    experiment: str,
    variable: str,
    study: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "studies").mkdir()
    for name in ("table7", "table7-labels", "table8"):
        (tmp_path / f"studies/{name}.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTRADIFF_STUDY", variable)
    assert study_of(experiment) == study
