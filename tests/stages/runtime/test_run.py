"""The frame of all stages: command line, failures, several processes, resuming."""

from stages.runtime import launch, work_dir
from stages.runtime import run as run_module
from stages.runtime.gpu_memory import LESS_MEMORY
from stages.runtime.launch import num_processes
from stages.runtime.run import Run, RuntimeParams, execute
from stages.runtime.tracking import training_run
from stages.runtime.work_dir import NOTE_NAME, delete_finished, key_of

import importlib.util
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from ruamel.yaml import YAML
from torch.distributed.launcher import api

from contradiff.files import hold_lock
from contradiff.processes import Part, PartFinished
from contradiff.signals import Stopped

ROOT = Path(__file__).resolve().parents[3]
RUNTIME = "runtime: {device: cpu, num_workers: 0, log_every: 1, checkpoint_every: 1}\n"

STAGE = '''
"""A stage for tests."""
import os, signal, time
from pathlib import Path
from pydantic import Field
from contradiff.config import Section
from stages.runtime.run import Run, execute

class LossParams(Section):
    weight: float = Field(alias="lambda", gt=0)

class Params(Section):
    seed: int
    loss: LossParams

def describe(params: Params) -> str:
    return f"{params.seed} is the seed"

def main(params: Params, run: Run) -> None:
    match os.environ.get("ACT"), run.is_main:
        case ("all fail", _) | ("second fails", False):
            raise ValueError("data.root: nothing there")
        case "second is killed", False:
            os.kill(os.getpid(), signal.SIGKILL)
        case ("second fails" | "second is killed"), True:
            time.sleep(60)
        case "wait", _:
            with run.work_dir(dict(params), [], state_version=1) as folder:
                try:
                    (folder / "checkpoint").touch()
                    Path(f"started-{os.environ.get('RANK', 0)}").touch()
                    time.sleep(60)
                finally:
                    Path("cleaned").touch()
        case "train", _:
            train(run)
        case "gather", _:
            import torch
            numbers = run.accelerator().gather(torch.tensor([int(os.environ["RANK"])]))
            Path(f"seen-by-{os.environ['RANK']}").write_text(str(numbers.tolist()))
    run.write_json(Path("build/out.json"), {"root": str(run.root), "weight": params.loss.weight})

def train(run: Run) -> None:
    import torch
    from unittest.mock import Mock
    from contradiff.training import loop, state
    model = torch.nn.Linear(1, 1)
    optimizer = Mock(param_groups=[])  # torch's would import torch._dynamo, for seconds
    optimizer.state_dict.return_value = {"state": {}}

    def step_function(step: int) -> dict[str, torch.Tensor]:
        Path(f"started-{os.environ.get('RANK', 0)}").touch()
        time.sleep(0.1)
        loss = model(torch.ones(1, 1)).sum()
        loss.backward()
        return {"loss": loss}

    with run.work_dir({}, [], state_version=1) as folder:
        loop.train(
            step_function,
            steps=range(10_000),
            optimizer=optimizer,
            lr=lambda _: 1e-6,
            lr_key="lr",
            is_reported=lambda _: False,
            on_step=lambda *_: None,
            saved=state.SavedState(folder / "checkpoint", model.state_dict(), every=10_000),
            accelerator=run.accelerator(),
        )

def debug(mode: str, params: Params, run: Run) -> None:
    Path(f"debug-{os.environ.get('RANK', 0)}").write_text(mode)

if __name__ == "__main__":
    execute(Params, main, parallel=True, debug=debug)
'''

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    return Run(stage="track", root=tmp_path, runtime=runtime)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a params.yaml and one stage."""
    for name in ("stages", "contradiff"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "demo.py").write_text(STAGE)
    (tmp_path / "params.yaml").write_text("seed: 3\nloss: {lambda: 1e-05}\nother: 1\n" + RUNTIME)
    return tmp_path


@pytest.fixture
def call(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Run the stage in this process; return its exit code, output and messages.

    If it starts several processes, this process, which has imported torch already, is the launcher.
    """
    spec = importlib.util.spec_from_file_location("demo", project / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(project)
    monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", "1")

    def call(
        *arguments: str,
        fault: BaseException | None = None,
        has_parts: bool = False,
        **environment: str,
    ) -> tuple[int, str, str]:
        def fail(*_: object) -> NoReturn:
            raise fault

        monkeypatch.setattr(sys, "argv", ["demo", *arguments])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = 0
        try:
            main = fail if fault else module.main
            options = {"parallel": True, "has_parts": has_parts}
            execute(module.Params, main, debug=module.debug, **options)
        except SystemExit as error:
            code = error.code
        return (code, *capfd.readouterr())

    yield call
    logging.disable(logging.NOTSET)  # the launcher has turned it off


def start(project: Path, act: str, *, processes: int) -> "subprocess.Popen[str]":
    """Start the stage as users and DVC do."""
    environment = os.environ | {"CONTRADIFF_NUM_PROCESSES": str(processes), "ACT": act}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "demo"], cwd=project, env=environment, **pipes)


def test_a_stage_writes_its_outs(project: Path, call: Call):
    main_project = project / "elsewhere"
    status, _, err = call(DVC_ROOT=str(main_project))
    assert (status, err.count("demo: done in")) == (0, 1)
    written = json.loads((project / "build/out.json").read_text())
    assert written == {"root": str(main_project), "weight": 1e-5}


@pytest.mark.parametrize("processes", ["1", "2"])
def test_dry_run_shows_parameters_and_does_nothing(project: Path, call: Call, processes: str):
    status, out, _ = call("--dry-run", CONTRADIFF_NUM_PROCESSES=processes)
    assert (status, out) == (0, "seed: 3\nloss:\n  lambda: 1e-05\n3 is the seed\n")
    assert not (project / "build").exists()


def test_help_says_what_the_stage_does(call: Call):
    status, out, _ = call("--help")
    assert (status, "A stage for tests." in out, "--dry-run" in out) == (0, True, True)


NOTHING_THERE = "data.root: nothing there"
GO_ON = "; run the same command to go on"
INTERRUPTED = "interrupted" + GO_ON
KILLED = "process 1 was killed by SIGKILL, perhaps because memory ran out"


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (ValueError(NOTHING_THERE), 2, NOTHING_THERE),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "[Errno 2] No such file: 'a.txt'"),
        (Stopped(2), 130, INTERRUPTED),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 0 has"),
            2,
            "the GPU's memory ran out (CUDA out of memory. Tried 2 GiB); use a larger GPU",
        ),
        (
            Stopped(15, saved="saved at step 22"),
            143,
            "saved at step 22; run the same command to go on",
        ),
    ],
)
def test_a_fault_gives_one_message(call: Call, fault: BaseException, code: int, message: str):
    assert call(fault=fault) == (code, "", f"contradiff: demo: {message}\n")


@pytest.mark.parametrize(
    ("act", "message"),
    [("all fail", NOTHING_THERE), ("second fails", NOTHING_THERE), ("second is killed", KILLED)],
)
def test_a_fault_of_several_processes_gives_one_message(call: Call, act: str, message: str):
    said = f"contradiff: demo: {message}\n"
    assert call(ACT=act, CONTRADIFF_NUM_PROCESSES="2") == (2, "", said)


def test_each_parallel_stage_knows_what_lowers_its_memory():
    sections = YAML(typ="safe").load(ROOT / "presets/paper.yaml")
    for file in (ROOT / "stages").glob("*.py"):
        if "parallel=True" in file.read_text():
            assert file.stem in LESS_MEMORY
    for keys in (re.findall(r"(\w+)\.(\w+)", text) for text in LESS_MEMORY.values()):
        assert all(key in sections[section] for section, key in keys)


def test_bugs_keep_their_traceback_and_faults_show_it_on_demand(call: Call):
    with pytest.raises(RuntimeError, match="a bug"):
        call(fault=RuntimeError("a bug"))
    with pytest.raises(ValueError, match=NOTHING_THERE):
        call(fault=ValueError(NOTHING_THERE), CONTRADIFF_TRACEBACK="1")


def test_wrong_parameters_are_named(project: Path, call: Call):
    params = project / "params.yaml"
    params.write_text("seed: true\nloss: {lambda: -1.0, lamda: 2}\n" + RUNTIME)
    status, _, err = call()
    assert status == 2
    for key in ("seed", "loss.lambda", "loss.lamda"):
        assert f"params.yaml: {key}: " in err
    params.write_text("seed: 1\nloss: {lambda: 1.0}\nruntime: {device: tpu}\n")
    assert "params.yaml: runtime.device: " in call()[2]


def test_a_debug_run_replaces_the_stage_in_every_process_and_dvc_cannot_start_it(
    project: Path, call: Call, monkeypatch: pytest.MonkeyPatch
):
    assert call("--debug", "overfit")[0] == 0
    assert (project / "debug-0").read_text() == "overfit"
    assert not (project / "build").exists()
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(api, "elastic_launch", lambda *_: lambda *given: started.append(given))
    assert call("--debug", "overfit", CONTRADIFF_NUM_PROCESSES="2")[0] == 0
    assert started == [("-m", "demo", "--debug", "overfit")]
    code, _, err = call("--debug", "anomaly", DVC_ROOT=str(project))
    remedy = "so DVC must not start it; type `python -m stages.demo --debug anomaly`"
    assert (code, remedy in err) == (2, True)


@pytest.mark.parametrize(
    ("number", "processes", "act", "message"),
    [
        ("TERM", 1, "wait", INTERRUPTED),
        ("INT", 2, "wait", INTERRUPTED),
        ("INT", 1, "train", r"saved at step \d+" + GO_ON),
        ("USR1", 2, "train", r"saved at step \d+" + GO_ON),
    ],
)
def test_a_stopped_stage_cleans_up_and_keeps_its_work(
    project: Path, number: str, processes: int, act: str, message: str
):
    process = start(project, act, processes=processes)
    while len(list(project.glob("started-*"))) < processes:
        assert process.poll() is None
        time.sleep(0.05)
    sent = signal.Signals[f"SIG{number}"]
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert re.fullmatch(f"contradiff: demo: {message}\n", err)
    assert (project / "cleaned").exists() == (act == "wait")
    assert len(list(project.glob(".work/demo/*/checkpoint"))) == 1


def test_two_processes_find_each_other(project: Path, call: Call):
    code, _, err = call(ACT="gather", CONTRADIFF_NUM_PROCESSES="2")
    assert (code, err.count("demo: done in")) == (0, 1), err
    for rank in (0, 1):
        assert (project / f"seen-by-{rank}").read_text() == "[0, 1]"


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch):
    for text in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", text)
        with pytest.raises(ValueError, match=f"CONTRADIFF_NUM_PROCESSES={text}: must be"):
            num_processes()
    monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", "2")
    assert num_processes() == 2
    monkeypatch.setenv("WORLD_SIZE", "4")  # another launcher has started this process
    assert num_processes() == 1


def test_without_a_gpu_a_long_stage_takes_two_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "num_cores", lambda: 4)
    assert (num_processes(), num_processes(without_gpu=2)) == (1, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in a study's workers: the cores are shared
    assert num_processes(without_gpu=2) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "num_cores", lambda: 1)
    assert num_processes(without_gpu=2) == 1


def leave_work(run: Run, params: Mapping[str, object]) -> Path:
    """Fail after a checkpoint."""

    def fail() -> None:
        with run.work_dir(params, [], state_version=1) as folder:
            (folder / "checkpoint").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    [folder] = (run.root / ".work" / run.stage).iterdir()
    return folder


def test_work_is_kept_on_failure_and_deleted_on_success(run: Run):
    folder = leave_work(run, {"seed": 0})
    with run.work_dir({"seed": 0}, [], state_version=1) as again:
        assert again == folder
        assert (again / "checkpoint").exists()
    assert not folder.exists()
    with run.work_dir({"seed": 0}, [], state_version=1) as fresh:
        assert [file.name for file in fresh.iterdir()] == [NOTE_NAME]


@pytest.mark.parametrize(
    ("by_dvc", "edited", "taken_over"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_finished_work_is_taken_over_if_dvc_may_not_have_recorded_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, *, by_dvc: bool, edited: bool, taken_over: bool
):
    """With other code, or by hand, it is computed again."""
    monkeypatch.setenv("DVC_ROOT", str(run.root))
    with run.work_dir({"seed": 0}, [], state_version=1) as folder:
        (folder / "checkpoint").touch()
    if not by_dvc:
        monkeypatch.delenv("DVC_ROOT")
    if edited:
        monkeypatch.setattr(run_module, "code_digest", lambda: "of other code")
    with run.work_dir({"seed": 0}, [], state_version=1) as again:
        left = {file.name for file in again.iterdir()}
        assert left == ({"checkpoint", NOTE_NAME} if taken_over else {NOTE_NAME})


def test_only_finished_work_that_nobody_uses_is_deleted(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_ROOT", str(run.root))
    unfinished = leave_work(run, {"seed": 0})
    with run.work_dir({"seed": 1}, [], state_version=1) as finished:
        pass
    with run.work_dir({"seed": 2}, [], state_version=1) as used:
        delete_finished(run.root)
        assert (unfinished.exists(), finished.exists(), used.exists()) == (True, False, True)
    delete_finished(run.root)
    assert (unfinished.exists(), used.exists()) == (True, False)


@pytest.mark.parametrize("killed", [False, True])
def test_the_same_work_waits_for_another_process_and_takes_its_result_over(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *, killed: bool
):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work() -> None:
        with run.work_dir({"seed": 0}, [], state_version=1) as folder:
            (folder / "checkpoint").touch()
            ready.set()
            time.sleep(60 if killed else 0.5)

    process = context.Process(target=work)
    with monkeypatch.context() as patch:
        patch.setenv("DVC_ROOT", str(run.root))
        process.start()
    assert ready.wait(timeout=60)
    if killed:
        process.kill()
        process.join()
    with run.work_dir({"seed": 0}, [], state_version=1) as folder:
        assert (folder / "checkpoint").exists()
    process.join()
    said = capfd.readouterr().err
    assert (f"waiting for process {process.pid}, which is doing the same" in said) != killed
    assert (f"process {process.pid} has finished the same work; taking its " in said) != killed


def test_parts_share_a_folder_and_a_whole_run_waits_for_them(run: Run):
    def open_folder(run: Run, version: int = 1) -> AbstractContextManager[Path]:
        return run.work_dir({}, [], state_version=version)

    first, second = (replace(run, part=Part(number, 2)) for number in (1, 2))
    with open_folder(first) as folder, open_folder(second) as same:
        assert same == folder
        (folder / "shard").touch()
        lock = work_dir.lock_of(run.root, run.stage, folder.name)
        with pytest.raises(BlockingIOError), hold_lock(lock, on_wait=refuse):
            pass
        with pytest.raises(ValueError, match="is already doing the work of part 2-of-2"):
            open_folder(second).__enter__()
    with pytest.raises(ValueError, match="another version; delete the folder"):
        open_folder(first, version=2).__enter__()
    with open_folder(run) as whole:  # finds what the parts have made
        assert (whole / "shard").exists()
        with pytest.raises(ValueError, match=rf"process {os.getpid()} is already doing the work"):
            open_folder(first).__enter__()
    assert not folder.exists()


def refuse(_pid: str) -> NoReturn:
    raise BlockingIOError


def test_dvc_starts_no_part_and_other_stages_have_none(call: Call, project: Path):
    code, _, err = call("--part", "1/2")
    assert (code, "--part: the work of this stage cannot be divided" in err) == (2, True)
    code, _, err = call("--part", "17/16", has_parts=True)
    assert (code, "--part: '17/16' is no part; the sixteen" in err) == (2, True)
    done = "part 3-of-16 is finished; without --part, the stage gathers all parts"
    code, _, err = call("--part", "3/16", fault=PartFinished(), has_parts=True)
    assert (code, err) == (0, f"demo: {done}\n")
    code, _, err = call("--part", "3/16", has_parts=True, DVC_ROOT=str(project))
    assert (code, "type `python -m stages.demo --part 3/16`" in err) == (2, True)


def test_work_goes_on_under_another_commit_but_not_with_another_state(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    anew = "track: starting again: the unfinished work has version 1, but this code needs "
    for state_version, commit, said in (
        (1, "commit-1", ""),
        (
            1,
            "commit-2",
            "track: resuming work that commit commit-1 began; the code is now commit-2\n",
        ),
        (2, "commit-1", f"{anew}version 2\n"),
    ):
        monkeypatch.setattr(work_dir, "revision", lambda: "commit-1")
        leave_work(run, {})
        monkeypatch.setattr(work_dir, "revision", lambda commit=commit: commit)
        with run.work_dir({}, [], state_version=state_version) as folder:
            assert (folder / "checkpoint").exists() == (state_version == 1)
        assert capfd.readouterr().err == said


def test_the_key_sees_what_decides_the_result(tmp_path: Path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents/a.tar").write_bytes(b"1234")
    (tmp_path / "index.json").write_text("{}")
    inputs = [tmp_path / "latents", tmp_path / "index.json"]

    def key(inputs: list[Path], **params: object) -> str:
        return key_of("track", params=params, inputs=inputs)

    before = key(inputs, seed=0, lr=0.1)
    assert key(inputs[::-1], lr=0.1, seed=0) == before
    assert key(inputs, seed=1, lr=0.1) != before
    (tmp_path / "latents/a.tar").write_bytes(b"4321")  # of the same size
    edited = key(inputs, seed=0, lr=0.1)
    (tmp_path / "latents/a.tar").rename(tmp_path / "latents/b.tar")
    assert len({before, edited, key(inputs, seed=0, lr=0.1)}) == 3
    with pytest.raises(FileNotFoundError, match="missing"):
        key([tmp_path / "missing"])


def test_json_is_sorted_rounded_and_whole(run: Run, tmp_path: Path):
    path = tmp_path / "metrics/probe.json"
    run.write_json(path, {"probe": {"top1": 1 / 3, "classes": 10}, "a": 12345.678})
    assert " ".join(path.read_text().split()) == (
        '{ "a": 12345.7, "probe": { "classes": 10, "top1": 0.333333 } }'
    )
    for content in ({"top1": float("nan")}, {"top5": 1.0, "top1": [0.5, float("nan")]}):
        with pytest.raises(ValueError, match=r"probe\.json: top1: NaN is not a result"):
            run.write_json(path, {"probe": content})
    with pytest.raises(ValueError, match=r"probe\.json: fid: -Infinity is not a result"):
        run.write_json(path, {"name": "NaN", "fid": float("-inf")})
    assert [file.name for file in path.parent.iterdir()] == ["probe.json"]


def test_only_the_main_process_writes(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "1")
    run.write_json(run.root / "out.json", {})
    run.log("hello")
    with run.progress("train", total=2) as advance:
        advance(2)
    with training_run(run, run.root, {}, files_checkpoint=True) as log:
        log(1, {"loss": 1.0})
    assert list(run.root.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def with_runtime(run: Run, **changes: object) -> Run:
    return replace(run, runtime=RuntimeParams(**run.runtime.model_dump() | changes))


def test_device(run: Run, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert with_runtime(run, device="auto").device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"runtime\.device"):
        _ = with_runtime(run, device="cuda").device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert with_runtime(run, device="auto").device == torch.device("cuda", 1)
    assert with_runtime(run, device="cpu").device == torch.device("cpu")


def test_training_reads_shards_from_where_their_copies_are(run: Run):
    assert run.shards(Path("build/latents")) == Path("build/latents")
    for url in ("s3://bucket/demo", "s3://bucket/demo/"):
        there = with_runtime(run, shards_from=url).shards(Path("build/shards"))
        assert there == "s3://bucket/demo/shards"
    for wrong in ("bucket/demo", "https://me:secret@host/demo", "https://host/demo?token=secret"):
        with pytest.raises(ValueError, match="shards_from"):
            with_runtime(run, shards_from=wrong)


@pytest.mark.parametrize(("seconds", "num_lines"), [(0.0, 6), (10.0, 2)])
def test_progress_in_a_log_file_is_lines(
    run: Run, monkeypatch: pytest.MonkeyPatch, seconds: float, num_lines: int
):
    """At the beginning, now and then, and at the end."""
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_LINES", seconds)
    monkeypatch.setattr(sys, "stderr", StringIO())
    with run.progress("train", 20) as advance:
        for _ in range(4):
            advance(5, loss=0.125)
    first, *_, last = lines = sys.stderr.getvalue().splitlines()
    assert len(lines) == num_lines
    assert first.startswith("track: train:   0%")
    assert "20/20 [" in last
    assert last.endswith("loss=0.125]")
    assert "\r" not in sys.stderr.getvalue()
