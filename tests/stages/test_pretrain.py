"""stages.pretrain: --dry-run's parameters, to the integer, without weights; what a run is given."""

from stages.runtime import training
from stages.runtime.run import Run, RuntimeParams

import copy
import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from ruamel.yaml import YAML
from torch import Tensor

from contradiff.config import parse, read_params
from contradiff.method.objective import TrainingBatch, TrainingStep
from contradiff.signals import Stopped
from contradiff.training.flops import of_training_step
from stages import pretrain
from tests.settings import TINY

ROOT = Path(__file__).resolve().parents[2]

# Our reading of Tables 3, 7 and 9: trainable, frozen, the paper's own number.
PAPER_SCALE = {
    "LoRA": ("1,191,936", "", ""),
    "conditional encoder": ("38,729,984", "", ""),
    "tri-timestep attention": ("25,976,320", "", ""),
    "projector": ("1,181,696", "", ""),
    "linear classifier": ("1,025,000", "", ""),
    "UNet": ("", "859,520,964", ""),
    "VAE": ("", "83,653,863", ""),
    "feature extraction": ("28,183,016", "", "28M"),
    "sum": ("68,104,936", "943,174,827", "68M, 980M; together 1048M"),
}


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return read_params(ROOT / "presets/paper.yaml")


def describe(content: dict[str, Any]) -> str:
    YAML().dump(content, Path("params.yaml"))
    return pretrain.describe(parse(pretrain.Params, content, source="params.yaml"))


def read_table(text: str) -> dict[str, tuple[str, str, str]]:
    lines = text.partition("\n\n")[0].strip("\n").splitlines()
    return {
        line[:22].strip(): (line[24:38].strip(), line[40:54].strip(), line[56:].strip())
        for line in lines[1:]
    }


def test_paper_scale_counts(paper: dict[str, Any]):
    text = describe(paper)
    assert read_table(text) == PAPER_SCALE
    assert "together: 1,011,279,763." in text
    assert "CLIP's text encoder. The method does not use the text" in text
    assert "linear classifier over 1000 classes, which the stage `probe` trains" in text
    paper["conditioner"] |= {"input": "latents", "patch_size": 2}
    assert read_table(describe(paper))["conditional encoder"][0] == "38,344,960"


def test_papers_numbers_stand_beside_the_papers_base_alone(paper: dict[str, Any], tiny_base: Path):
    """By its architecture, not by its name: here the same files in a local folder."""
    local = {"source": "local", "revision": None}
    paper["base"] = local | {"path": str(ROOT / "presets" / "stable-diffusion-v1-4")}
    assert read_table(describe(paper)) == PAPER_SCALE
    paper["base"] = local | {"path": str(tiny_base)}
    paper["data"]["image_size"] = 32
    text = describe(paper)
    table = read_table(text)
    assert list(table) == [name for name in PAPER_SCALE if name != "linear classifier"]
    assert "paper" not in text
    together = sum(int(n.replace(",", "")) for n in table["sum"][:2])
    assert f"together: {together:,}." in text


Start = Callable[..., str]


class Started(BaseException):
    """The training would begin here."""


@pytest.fixture
def tiny(tiny_params: dict[str, Any]) -> dict[str, Any]:
    """Parameters that suit `trained_project`."""
    content = copy.deepcopy(TINY | tiny_params)
    content["data"]["image_size"] = 32
    content["pretrain"]["batch_size"] = 8
    return content


@pytest.fixture
def start(trained_project: Run, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Start:
    """Run the stage up to the training, sections changed by keywords; returns its precision."""
    from accelerate.state import AcceleratorState

    given: list[str] = []

    def stop(*_: Any, **settings: Any) -> None:
        given.append(settings["accelerator"].mixed_precision)
        raise Started

    monkeypatch.setattr(pretrain, "pretrain", stop)
    monkeypatch.setattr(training, "training_run", lambda *_, **__: nullcontext())

    def run(**changes: dict[str, Any]) -> str:
        for name, change in changes.items():
            tiny[name] |= change
        sections = {name: tiny[name] for name in pretrain.Params.model_fields}
        params = parse(pretrain.Params, sections, source="params.yaml")
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(Started):
            pretrain.main(params, trained_project)
        AcceleratorState._reset_state(reset_partial_state=True)
        return given[-1]

    return run


HOSTILE = {
    "GRADIENT_ACCUMULATION_STEPS": "4",
    "MIXED_PRECISION": "bf16",
    "DYNAMO_BACKEND": "inductor",
    "DYNAMO_USE_FULLGRAPH": "maybe",
    "TORCH_DEVICE": "meta",
    "USE_CPU": "true",
    "USE_FSDP": "false",
    "DEBUG_MODE": "1",
    "FP8_BACKEND": "TE",
}
"""Environment variables of Accelerate, without ACCELERATE_."""


def test_accelerates_variables_change_no_bit_of_a_training(
    trained_project: Run,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(training, "training_run", lambda *_, **__: nullcontext(lambda *_: None))
    tiny["pretrain"] |= {"epochs": 1}
    sections = {name: tiny[name] for name in pretrain.Params.model_fields}
    params = parse(pretrain.Params, sections, source="params.yaml")
    weights: list[bytes] = []
    for environment in ({}, HOSTILE):
        for name, value in environment.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        AcceleratorState._reset_state(reset_partial_state=True)
        pretrain.main(params, trained_project)
        weights.append(Path("build/pretrain/model.safetensors").read_bytes())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert weights[0] == weights[1]
    assert (
        "ignored, because params.yaml decides: ACCELERATE_DEBUG_MODE=1" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_strategies_of_accelerate_are_refused(start: Start, name: str, monkeypatch: Any):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "True")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name} is True, .* `unset ACCELERATE"):
        start()


@pytest.mark.parametrize(("precision", "mixed"), [("fp32", "no"), ("bf16", "bf16")])
def test_the_precision_reaches_accelerate(start: Start, precision: str, mixed: str):
    assert start(pretrain={"precision": precision}) == mixed


@pytest.mark.parametrize(("number", "weight", "warned"), [(2, 0.1, 1), (1, 0.1, 0), (2, 0.0, 0)])
def test_negatives_of_one_microbatch_are_warned_of(
    start: Start, capsys: pytest.CaptureFixture[str], number: int, weight: float, warned: int
):
    start(pretrain={"grad_accumulation": number}, loss={"lambda": weight})
    warning = "pretrain.grad_accumulation: the contrastive loss and the projector's BatchNorm see "
    assert capsys.readouterr().err.count(f"{warning}the 4 ") == warned


def forget_code() -> dict[str, ModuleType]:
    """Let the next imports read our code anew; return the modules."""
    ours = [name for name in sys.modules if name.partition(".")[0] in ("contradiff", "stages")]
    return {name: sys.modules.pop(name) for name in ours}


def train_two_steps(content: dict[str, Any]) -> int:
    """Import the code anew, and stop a training in its 2nd step; return the steps done before."""
    from accelerate.state import AcceleratorState

    forget_code()
    importlib.invalidate_caches()
    from stages.runtime import training
    from stages.runtime.run import Run, RuntimeParams

    from contradiff.config import parse
    from contradiff.training import pretraining
    from stages import pretrain

    assert Path(pretrain.__file__).is_relative_to(Path.cwd())
    training.training_run = lambda *_, **__: nullcontext(lambda *_: None)
    train, starts = pretraining.train, list[int]()

    def stop_early(*args: Any, steps: range, **settings: Any) -> None:
        def stop(done: int, _: Any) -> None:
            if done == steps.start + 2:
                raise KeyboardInterrupt

        starts.append(steps.start)
        train(*args, steps=steps, **(settings | {"on_step": stop}))

    pretraining.train = stop_early
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    sections = {name: content[name] for name in pretrain.Params.model_fields}
    params = parse(pretrain.Params, sections, source="params.yaml")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(params, Run(stage="pretrain", root=Path.cwd(), runtime=runtime))
    AcceleratorState._reset_state(reset_partial_state=True)
    return starts[0]


@pytest.mark.usefixtures("trained_project")
def test_a_stopped_training_survives_an_edit_and_begins_anew_with_another_state_version(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The package is copied, so that its source can be edited; each run stops in its 2nd step."""
    code = Path("code").absolute()
    for name in ("contradiff", "stages"):
        shutil.copytree(ROOT / name, code / name)
    monkeypatch.syspath_prepend(code)
    # The check of shapes would compare the copy's classes with those of the package.
    finders = [each for each in sys.meta_path if "jaxtyping" not in type(each).__module__]
    monkeypatch.setattr(sys, "meta_path", finders)
    loop, state = (code / f"contradiff/training/{name}.py" for name in ("loop", "state"))
    kept = forget_code()
    try:
        starts = [train_two_steps(tiny)]
        loop.write_text(loop.read_text() + "# a comment\n")
        starts.append(train_two_steps(tiny))
        text = state.read_text().replace("STATE_VERSION = ", "STATE_VERSION = 100 + ")
        state.write_text(text)
        starts.append(train_two_steps(tiny))
    finally:
        forget_code()
        sys.modules.update(kept)
    assert starts == [0, 1, 0]
    expected = r"starting again: the unfinished work has version (\d+), .* needs version 10\1"
    assert len(re.findall(expected, capfd.readouterr().err)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "num_rows", "tolerance"),
    [
        ({}, 12, 1e-4),
        ({"grad_accumulation": 2}, 12, 1e-4),
        # rounding to bfloat16 soon leads elsewhere: the first rows, of the weights at the start
        ({"precision": "bf16"}, 2, 5e-3),
    ],
)
@pytest.mark.usefixtures("trained_project")
def test_two_processes_train_as_one(
    tiny: dict[str, Any], changes: dict[str, Any], num_rows: int, tolerance: float
):
    """Rows of the curve, whose later ones see the weights that the former steps left."""
    tiny["pretrain"] |= changes
    tiny["runtime"] |= {"device": "cpu", "checkpoint_every": 5}
    YAML().dump(tiny, Path("params.yaml"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
    curves: list[list[dict[str, float]]] = []
    for count in ("1", "2"):
        command = [sys.executable, "-m", "stages.pretrain"]
        subprocess.run(command, check=True, env=environment | {"CONTRADIFF_NUM_PROCESSES": count})
        with Path("metrics/pretrain.csv").open(newline="") as file:
            curves.append([{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)])
    alone, together = curves
    assert len(alone) == len(together) == 4 * 24 // 8
    for one, two in zip(alone[:num_rows], together[:num_rows], strict=True):
        assert two == pytest.approx(one, rel=tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("trained_project")
def test_a_killed_process_ends_the_training_and_another_number_of_processes_goes_on(
    tiny: dict[str, Any],
):
    """Three processes cannot share a batch of eight, so they are refused."""
    tiny["pretrain"]["epochs"] = 60
    tiny["runtime"] |= {"device": "cpu", "checkpoint_every": 1}
    YAML().dump(tiny, Path("params.yaml"))

    def start(number: int) -> "subprocess.Popen[str]":
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment["CONTRADIFF_NUM_PROCESSES"] = str(number)
        command = [sys.executable, "-m", "stages.pretrain"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    training = start(2)
    while not list(Path(".work/pretrain").glob("*/state.safetensors")):
        assert training.poll() is None
        time.sleep(0.05)
    ranks = psutil.Process(training.pid).children(recursive=True)
    next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
    _, said = training.communicate(timeout=60)
    assert training.returncode == 2
    assert "process 1 was killed by SIGKILL, perhaps because memory ran out" in said
    assert "Traceback" not in said
    refused = start(3)
    message = "pretrain.batch_size: 8 must be a multiple of 3 (processes)"
    assert message in refused.communicate()[1]
    assert refused.returncode == 2
    alone = start(1)
    alone.communicate()
    assert alone.returncode == 0
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    trainings = client.get_experiment_by_name("contradiff-train").experiment_id
    [run] = client.search_runs([trainings])  # the one that two processes began
    assert (run.info.status, run.data.tags["world_size"]) == ("FINISHED", "2")
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("every", "rank", "kept"), [(0, "0", []), (2, "0", [0, 2, 4]), (5, "0", [0, 5]), (2, "1", [])]
)
def test_checkpoints_are_kept_every_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, rank: str, kept: list[int]
):
    monkeypatch.setenv("RANK", rank)
    options = {"device": "cpu", "num_workers": 0, "log_every": 1, "checkpoint_every": 1}
    runtime = RuntimeParams.model_validate(options | {"keep_every": every})
    seen: list[int] = []
    session: Any = {"on_step": lambda step, _row: seen.append(step)}
    session |= {"work_dir": tmp_path / ".work/pretrain/key"}
    saved: dict[Path, int] = {}
    changed = pretrain.keep_checkpoints(
        Run(stage="pretrain", root=tmp_path, runtime=runtime),
        session,
        lambda folder, num_steps: saved.update({folder: num_steps}),
    )
    for step in range(1, 6):
        changed["on_step"](step, None)
    assert seen == [1, 2, 3, 4, 5]
    assert saved == {tmp_path / f".work/checkpoints/key/{step:08}": step for step in kept}


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("an unknown card", "bf16", None),
    ],
)
def test_a_known_card_has_a_ceiling_that_checkpointing_does_not_move(
    trained_project: Run,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    precision: str,
    peak: float | None,
):
    monkeypatch.setattr(Run, "device", property(lambda _: torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    tiny["pretrain"] |= {"precision": precision, "gradient_checkpointing": "all"}
    params = parse(pretrain.Params, tiny, source="params.yaml")
    ceiling = pretrain.watch_of(params, trained_project, num_steps=9, num_processes=4).ceiling
    if peak is None:
        assert ceiling is None
        return
    tiny["pretrain"]["gradient_checkpointing"] = "none"
    params = parse(pretrain.Params, tiny, source="params.yaml")
    gflop = of_training_step(params, Path("build/base"))
    assert ceiling == pytest.approx(4 * peak * 1000 / gflop)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def debug(
    trained_project: Run, tiny: dict[str, Any], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the stage with `--debug`; return what it prints, after a look at the project's files."""
    from accelerate.state import AcceleratorState

    def run(mode: str, **changes: Any) -> str:
        tiny["pretrain"] |= changes
        params = parse(pretrain.Params, tiny, source="params.yaml")
        before = files_of(workplace)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            pretrain.debug(mode, params, trained_project)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            assert files_of(workplace) == before
        return capsys.readouterr().err

    return run


def test_overfitting_one_batch_brings_its_loss_down(
    debug: Callable[..., str], tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """With much contrast, because a base of random weights can hardly denoise."""
    monkeypatch.setattr(pretrain, "OVERFIT_STEPS", 20)
    tiny["loss"]["lambda"] = 10.0
    said = debug("overfit", lr=0.01)
    losses = re.search(r"from (\S+) \(step 1\) to (\S+) \(step 20\); no file was written", said)
    assert float(losses[2]) < 0.5 * float(losses[1])


def test_two_batches_an_epoch_are_always_the_same(
    debug: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    seen: list[Tensor] = []
    forward = TrainingStep.forward

    def record(step: TrainingStep, batch: TrainingBatch) -> dict[str, Tensor]:
        seen.append(torch.cat([each.flatten() for each in (batch.latents, batch.noise)]))
        return forward(step, batch)

    monkeypatch.setattr(TrainingStep, "forward", record)
    said = debug("two-batches", epochs=3, warmup_epochs=1)
    assert "(step 6); no file was written" in said
    first, second = seen[:2]
    assert not first.equal(second)
    assert all(batch.equal((first, second)[number % 2]) for number, batch in enumerate(seen))


@pytest.mark.filterwarnings("ignore:Error detected in SqrtBackward0")  # torch's trace of the op
def test_anomaly_detection_names_the_operation(
    debug: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    forward = TrainingStep.forward

    def with_fault(step: TrainingStep, batch: TrainingBatch) -> dict[str, Tensor]:
        losses = forward(step, batch)
        fault = (losses["loss"] * 0.0).sqrt() * 0.0  # 0 in the forward pass, NaN in the backward
        return losses | {"loss": losses["loss"] + fault}

    monkeypatch.setattr(TrainingStep, "forward", with_fault)
    with pytest.raises(RuntimeError, match="Function 'SqrtBackward0' returned nan values"):
        debug("anomaly")
    assert not torch.is_anomaly_enabled()


def test_a_stopped_debug_run_does_not_speak_of_a_saved_state(
    debug: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: Any, **__: Any) -> None:
        raise Stopped(15, saved="saved at step 3")

    monkeypatch.setattr(pretrain, "pretrain", stop)
    with pytest.raises(Stopped, match=r"^interrupted;"):
        debug("overfit")
