"""The frame of all stages: command line, failures, resuming."""

from stages.runtime import launch, work_dir
from stages.runtime.progress import show_progress
from stages.runtime.run import Run, RuntimeParams
from stages.runtime.work_dir import NOTE_NAME, key_of

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

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
    match os.environ.get("ACT"):
        case "value":
            raise ValueError("data.root: nothing there")
        case "file":
            open("missing.txt")
        case "bug":
            raise RuntimeError("a bug")
        case "wait":
            with run.work_dir(dict(params), [], state_version=1) as folder:
                try:
                    (folder / "checkpoint").touch()
                    Path("started").touch()
                    time.sleep(60)
                finally:
                    Path("cleaned").touch()
    run.write_json(Path("build/out.json"), {"root": str(run.root), "weight": params.loss.weight})

if __name__ == "__main__":
    execute(Params, main)
'''


@pytest.fixture
def run(tmp_path: Path) -> Run:
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    return Run(stage="track", root=tmp_path, runtime=runtime)


class Project:
    """A folder with a params.yaml and one stage, run as users and DVC do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "stages").symlink_to(ROOT / "stages")
        (folder / "contradiff").symlink_to(ROOT / "contradiff")
        (folder / "demo.py").write_text(STAGE)
        self.params("seed: 3\nloss: {lambda: 1e-05}\nother: 1\n" + RUNTIME)

    def params(self, text: str) -> None:
        (self.folder / "params.yaml").write_text(text)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "demo", *arguments],
            cwd=self.folder,
            env=os.environ | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_stage_writes_its_outs(project: Project):
    main_repository = project.folder / "elsewhere"
    assert project.run(DVC_ROOT=str(main_repository))[0] == 0
    written = json.loads((project.folder / "build/out.json").read_text())
    assert written == {"root": str(main_repository), "weight": 1e-5}


def test_dry_run_shows_parameters_and_does_nothing(project: Project):
    status, out, _ = project.run("--dry-run")
    assert (status, out) == (0, "seed: 3\nloss:\n  lambda: 1e-05\n3 is the seed\n")
    assert not (project.folder / "build").exists()


def test_help_says_what_the_stage_does(project: Project):
    status, out, _ = project.run("--help")
    assert status == 0
    assert "A stage for tests." in out
    assert "--dry-run" in out


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("value", "contradiff: demo: data.root: nothing there\n"),
        ("file", "contradiff: demo: [Errno 2] No such file or directory: 'missing.txt'\n"),
    ],
)
def test_faults_of_the_user_give_one_message(project: Project, act: str, message: str):
    assert project.run(ACT=act) == (2, "", message)


def test_traceback_on_demand(project: Project):
    status, _, err = project.run(ACT="value", CONTRADIFF_TRACEBACK="1")
    assert status == 1
    assert "Traceback" in err


def test_bugs_keep_their_traceback(project: Project):
    status, _, err = project.run(ACT="bug")
    assert status == 1
    assert "Traceback" in err
    assert "done in" not in err


def test_wrong_parameters_are_named(project: Project):
    project.params("seed: true\nloss: {lambda: -1.0, lamda: 2}\n" + RUNTIME)
    status, _, err = project.run()
    assert status == 2
    for key in ("seed", "loss.lambda", "loss.lamda"):
        assert f"params.yaml: {key}: " in err


def test_wrong_runtime_is_named(project: Project):
    project.params("seed: 1\nloss: {lambda: 1.0}\nruntime: {device: tpu}\n")
    status, _, err = project.run()
    assert status == 2
    assert "runtime.device" in err


def test_terminated_stage_cleans_up_and_keeps_its_work(project: Project):
    process = project.start(ACT="wait")
    while not (project.folder / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert (project.folder / "cleaned").exists()
    assert len(list(project.folder.glob(".work/demo/*/checkpoint"))) == 1
    process.communicate()


def test_work_is_kept_on_failure_and_deleted_on_success(run: Run):
    def fail() -> None:
        with run.work_dir({"seed": 0}, [], state_version=1) as folder:
            (folder / "checkpoint").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    [folder] = (run.root / ".work" / run.stage).iterdir()
    with run.work_dir({"seed": 0}, [], state_version=1) as again:
        assert again == folder
        assert (again / "checkpoint").exists()
    assert not folder.exists()
    with run.work_dir({"seed": 0}, [], state_version=1) as fresh:
        assert [file.name for file in fresh.iterdir()] == [NOTE_NAME]


def test_same_work_twice_at_once_is_waited_for(run: Run, capfd: pytest.CaptureFixture[str]):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work() -> None:
        with run.work_dir({"seed": 0}, [], state_version=1):
            ready.set()
            time.sleep(0.5)
            (run.root / "done").touch()

    process = context.Process(target=work)
    process.start()
    assert ready.wait(timeout=60)
    with run.work_dir({"seed": 0}, [], state_version=1) as folder:
        assert (run.root / "done").exists()
        assert [file.name for file in folder.iterdir()] == [NOTE_NAME]
    process.join()
    assert f"waiting for process {process.pid}" in capfd.readouterr().err


def test_work_of_a_killed_process_is_free_again(run: Run):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hang() -> None:
        with run.work_dir({"seed": 0}, [], state_version=1) as folder:
            (folder / "checkpoint").touch()
            ready.set()
            time.sleep(60)

    process = context.Process(target=hang)
    process.start()
    assert ready.wait(60)
    process.kill()
    process.join()
    with run.work_dir({"seed": 0}, [], state_version=1) as folder:
        assert (folder / "checkpoint").exists()


@pytest.fixture
def interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose work was begun under commit 1, and stopped."""
    monkeypatch.setattr(work_dir, "revision", lambda: "commit-1")
    with run.work_dir({}, [], state_version=1) as folder:
        (folder / "checkpoint").touch()
        kept = {file: file.read_bytes() for file in folder.iterdir()}
    folder.mkdir()
    for file, content in kept.items():
        file.write_bytes(content)
    return run


def test_work_goes_on_under_another_commit_and_says_so(
    interrupted: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    with interrupted.work_dir({}, [], state_version=1) as folder:
        assert (folder / "checkpoint").exists()
        assert capfd.readouterr().err == ""
        monkeypatch.setattr(work_dir, "revision", lambda: "commit-2")
        work_dir._take_up(folder, state_version=1, log=interrupted.log)
        assert (folder / "checkpoint").exists()
    said = capfd.readouterr().err
    assert "going on with work that commit-1 began; the code is now commit-2" in said


def test_work_of_another_state_version_is_begun_anew(
    interrupted: Run, capfd: pytest.CaptureFixture[str]
):
    with interrupted.work_dir({}, [], state_version=2) as folder:
        assert not (folder / "checkpoint").exists()
    said = capfd.readouterr().err
    assert "beginning anew: the unfinished work has STATE_VERSION 1, this code saves" in said


class TestFingerprint:
    @pytest.fixture
    def inputs(self, tmp_path: Path) -> list[Path]:
        (tmp_path / "latents").mkdir()
        (tmp_path / "latents/a.tar").write_bytes(b"1234")
        (tmp_path / "index.json").write_text("{}")
        return [tmp_path / "latents", tmp_path / "index.json"]

    @staticmethod
    def key(inputs: list[Path], params: Mapping[str, object] | None = None) -> str:
        params = params or {"seed": 0, "lr": 0.1}
        return key_of("track", params=params, inputs=inputs)

    def test_is_stable_and_ignores_order(self, inputs: list[Path]):
        assert self.key(inputs) == self.key(inputs[::-1], {"lr": 0.1, "seed": 0})

    def test_sees_parameters(self, inputs: list[Path]):
        assert self.key(inputs) != self.key(inputs, {"seed": 1, "lr": 0.1})

    def test_sees_content_of_equal_size(self, inputs: list[Path]):
        before = self.key(inputs)
        (inputs[0] / "a.tar").write_bytes(b"4321")
        assert self.key(inputs) != before

    def test_sees_names(self, inputs: list[Path]):
        before = self.key(inputs)
        (inputs[0] / "a.tar").rename(inputs[0] / "b.tar")
        assert self.key(inputs) != before

    def test_missing_input_is_an_error(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="missing"):
            self.key([tmp_path / "missing"])


def test_json_is_sorted_rounded_and_whole(run: Run, tmp_path: Path):
    path = tmp_path / "metrics/probe.json"
    run.write_json(path, {"probe": {"top1": 1 / 3, "classes": 10}, "a": [12345.678]})
    assert path.read_text().endswith("}\n")
    assert list(json.loads(path.read_text()).items()) == [
        ("a", [12345.7]),
        ("probe", {"classes": 10, "top1": 0.333333}),
    ]
    with pytest.raises(ValueError, match=r"probe\.json: probe: top1: nan"):
        run.write_json(path, {"probe": {"top1": float("nan")}})
    assert [file.name for file in path.parent.iterdir()] == ["probe.json"]


def test_only_the_main_process_writes(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "1")
    run.write_json(run.root / "out.json", {})
    run.log("hello")
    with run.progress("train", total=2) as advance:
        advance(2)
    with run.training_run(run.root, {}, files_checkpoint=True) as log:
        log(1, {"loss": 1.0})
    assert list(run.root.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_device(run: Run, monkeypatch: pytest.MonkeyPatch):
    import torch

    def asking_for(device: str) -> Run:
        runtime = run.runtime.model_copy(update={"device": device})
        return Run(stage=run.stage, root=run.root, runtime=runtime)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert asking_for("auto").device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"runtime\.device"):
        _ = asking_for("cuda").device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert asking_for("auto").device == torch.device("cuda", 1)
    assert asking_for("cpu").device == torch.device("cpu")


def test_raw_data_is_relative_to_the_root(run: Run):
    assert run.resolve("data/raw") == run.root / "data/raw"
    assert run.resolve("/imagenet") == Path("/imagenet")


def test_training_reads_shards_from_where_their_copies_are(run: Run):
    def reading_from(url: str | None) -> Run:
        runtime = RuntimeParams.model_validate({**run.runtime.model_dump(), "shards_from": url})
        return Run(stage=run.stage, root=run.root, runtime=runtime)

    assert run.shards(Path("build/latents")) == Path("build/latents")
    assert reading_from(None).shards(Path("build/shards")) == Path("build/shards")
    for url in ("s3://bucket/demo", "s3://bucket/demo/"):
        assert reading_from(url).shards(Path("build/shards")) == "s3://bucket/demo/shards"
    with pytest.raises(ValueError, match="shards_from"):
        reading_from("bucket/demo")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("stages.runtime.progress.time.monotonic", lambda: now[0])
    return now


def test_progress_in_a_log_file_is_a_line_every_ten_seconds(
    clock: list[float], capfd: pytest.CaptureFixture[str]
):
    with show_progress("pretrain", total=100, unit="img", shown=True) as advance:
        for _ in range(25):
            clock[0] += 1.0
            advance(4, loss=0.12345)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3  # after 10, 20, and at the end
    assert lines[0].startswith("pretrain:  40%")
    assert "40/100 [00:10<00:15" in lines[0]
    assert lines[2].endswith("loss=0.1234]") or lines[2].endswith("loss=0.1235]")
    assert "\r" not in "".join(lines)


class TestLaunch:
    def test_one_process_needs_no_launcher(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", "1")
        monkeypatch.setattr(launch.os, "execv", lambda *_: pytest.fail("started again"))
        launch.start_several("track")

    def test_several_processes_are_torchrun_s(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", "2")
        monkeypatch.setattr(sys, "argv", ["stages/track.py", "--verbose"])
        monkeypatch.setattr(launch.os, "execv", lambda path, line: lines.append((path, line)))
        lines: list[tuple[str, list[str]]] = []
        launch.start_several("track")
        [(path, line)] = lines
        assert line[:3] == [path, "-m", "torch.distributed.run"]
        assert "--nproc-per-node=2" in line
        assert line[-3:] == ["-m", "stages.track", "--verbose"]

    def test_a_process_of_somebody_s_torchrun_joins(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", "2")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(launch.os, "execv", lambda *_: pytest.fail("started again"))
        launch.start_several("track")

    @pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
    def test_wrong_number(self, monkeypatch: pytest.MonkeyPatch, text: str):
        monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", text)
        with pytest.raises(ValueError, match=f"CONTRADIFF_NUM_PROCESSES={text}: must be"):
            launch.start_several("track")
