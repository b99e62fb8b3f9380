"""The frame of all stages: command line, failures, several processes, resuming."""

from stages.runtime import progress, work_dir
from stages.runtime.launch import num_processes
from stages.runtime.progress import show_progress
from stages.runtime.run import Run, RuntimeParams
from stages.runtime.tracking import training_run
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
                    Path(f"started-{os.environ.get('RANK', 0)}").touch()
                    time.sleep(60)
                finally:
                    Path("cleaned").touch()
        case "second fails":
            if not run.is_main:
                raise ValueError("data.root: nothing there")
            time.sleep(60)
        case "second is killed":
            if not run.is_main:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        case "gather":
            import torch
            numbers = run.accelerator().gather(torch.tensor([int(os.environ["RANK"])]))
            Path(f"seen-by-{os.environ['RANK']}").write_text(str(numbers.tolist()))
    run.write_json(Path("build/out.json"), {"root": str(run.root), "weight": params.loss.weight})

if __name__ == "__main__":
    execute(Params, main, parallel=True)
'''


@pytest.fixture
def run(tmp_path: Path) -> Run:
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    return Run(stage="track", root=tmp_path, runtime=runtime)


class Project:
    """A folder with a params.yaml and one stage, run as users and DVC do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("stages", "contradiff"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "demo.py").write_text(STAGE)
        self.params("seed: 3\nloss: {lambda: 1e-05}\nother: 1\n" + RUNTIME)

    def params(self, text: str) -> None:
        (self.folder / "params.yaml").write_text(text)

    def start(self, *arguments: str, processes: int = 1, **environment: str):
        return subprocess.Popen(
            [sys.executable, "-m", "demo", *arguments],
            cwd=self.folder,
            env=os.environ | {"CONTRADIFF_NUM_PROCESSES": str(processes)} | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, processes: int = 1, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, processes=processes, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_a_stage_writes_its_outs(project: Project):
    main_project = project.folder / "elsewhere"
    assert project.run(DVC_ROOT=str(main_project))[0] == 0
    written = json.loads((project.folder / "build/out.json").read_text())
    assert written == {"root": str(main_project), "weight": 1e-5}


@pytest.mark.parametrize("processes", [1, 2])
def test_dry_run_shows_parameters_and_does_nothing(project: Project, processes: int):
    status, out, _ = project.run("--dry-run", processes=processes)
    assert (status, out) == (0, "seed: 3\nloss:\n  lambda: 1e-05\n3 is the seed\n")
    assert not (project.folder / "build").exists()


def test_help_says_what_the_stage_does(project: Project):
    status, out, _ = project.run("--help", processes=2)
    assert status == 0
    assert "A stage for tests." in out
    assert "--dry-run" in out


NOTHING_THERE = "contradiff: demo: data.root: nothing there\n"


@pytest.mark.parametrize(
    ("act", "processes", "message"),
    [
        ("value", 1, NOTHING_THERE),
        ("file", 1, "contradiff: demo: [Errno 2] No such file or directory: 'missing.txt'\n"),
        ("value", 2, NOTHING_THERE),
        ("second fails", 2, NOTHING_THERE),
        (
            "second is killed",
            2,
            "contradiff: demo: process 1 was killed by SIGKILL, perhaps for want of memory\n",
        ),
    ],
)
def test_a_fault_gives_one_message(project: Project, act: str, processes: int, message: str):
    assert project.run(ACT=act, processes=processes) == (2, "", message)


@pytest.mark.parametrize(("act", "processes", "debug"), [("value", 1, "1"), ("bug", 2, "")])
def test_bugs_keep_their_traceback_and_faults_show_it_on_demand(
    project: Project, act: str, processes: int, debug: str
):
    status, _, err = project.run(ACT=act, processes=processes, CONTRADIFF_TRACEBACK=debug)
    assert status == 1
    assert "Traceback" in err
    assert "done in" not in err


def test_wrong_parameters_are_named(project: Project):
    project.params("seed: true\nloss: {lambda: -1.0, lamda: 2}\n" + RUNTIME)
    status, _, err = project.run()
    assert status == 2
    for key in ("seed", "loss.lambda", "loss.lamda"):
        assert f"params.yaml: {key}: " in err
    project.params("seed: 1\nloss: {lambda: 1.0}\nruntime: {device: tpu}\n")
    assert "params.yaml: runtime.device: " in project.run()[2]


@pytest.mark.parametrize(("number", "processes"), [("TERM", 1), ("TERM", 2), ("INT", 2)])
def test_a_stopped_stage_cleans_up_and_keeps_its_work(
    project: Project, number: str, processes: int
):
    process = project.start(ACT="wait", processes=processes)
    while len(list(project.folder.glob("started-*"))) < processes:
        assert process.poll() is None
        time.sleep(0.05)
    sent = signal.Signals[f"SIG{number}"]
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert "Traceback" not in err
    assert (project.folder / "cleaned").exists()
    assert len(list(project.folder.glob(".work/demo/*/checkpoint"))) == 1


def test_two_processes_find_each_other(project: Project):
    status, _, err = project.run(ACT="gather", processes=2)
    assert (status, err.count("demo: done in")) == (0, 1)
    for rank in (0, 1):
        assert (project.folder / f"seen-by-{rank}").read_text() == "[0, 1]"


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch):
    for text in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", text)
        with pytest.raises(ValueError, match=f"CONTRADIFF_NUM_PROCESSES={text}: must be"):
            num_processes()
    monkeypatch.setenv("CONTRADIFF_NUM_PROCESSES", "2")
    assert num_processes() == 2
    monkeypatch.setenv("WORLD_SIZE", "4")  # another launcher has started this process
    assert num_processes() == 1


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


def test_the_same_work_twice_at_once_waits(run: Run, capfd: pytest.CaptureFixture[str]):
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


def test_the_work_of_a_killed_process_is_free_again(run: Run):
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


@pytest.mark.parametrize(
    ("state_version", "commit", "kept", "said"),
    [
        (1, "commit-1", True, ""),
        (1, "commit-2", True, "resuming work that commit commit-1 began; this is commit-2"),
        (2, "commit-1", False, "beginning anew: the unfinished work has STATE_VERSION 1, and this"),
    ],
)
def test_work_goes_on_under_another_commit_but_not_with_another_state(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *,
    state_version: int,
    commit: str,
    kept: bool,
    said: str,
):
    def fail() -> None:
        with run.work_dir({}, [], state_version=1) as folder:
            (folder / "checkpoint").touch()
            raise RuntimeError

    monkeypatch.setattr(work_dir, "revision", lambda: "commit-1")
    with pytest.raises(RuntimeError):
        fail()
    monkeypatch.setattr(work_dir, "revision", lambda: commit)
    with run.work_dir({}, [], state_version=state_version) as folder:
        assert (folder / "checkpoint").exists() == kept
    heard = capfd.readouterr().err
    assert said in heard
    assert bool(said) == bool(heard)


class TestKey:
    @pytest.fixture
    def inputs(self, tmp_path: Path) -> list[Path]:
        (tmp_path / "latents").mkdir()
        (tmp_path / "latents/a.tar").write_bytes(b"1234")
        (tmp_path / "index.json").write_text("{}")
        return [tmp_path / "latents", tmp_path / "index.json"]

    @staticmethod
    def key(inputs: list[Path], params: Mapping[str, object] | None = None) -> str:
        return key_of("track", params=params or {"seed": 0, "lr": 0.1}, inputs=inputs)

    def test_sees_what_decides_the_result(self, inputs: list[Path]):
        before = self.key(inputs)
        assert self.key(inputs[::-1], {"lr": 0.1, "seed": 0}) == before
        assert self.key(inputs, {"seed": 1, "lr": 0.1}) != before
        (inputs[0] / "a.tar").write_bytes(b"4321")  # of the same size
        edited = self.key(inputs)
        (inputs[0] / "a.tar").rename(inputs[0] / "b.tar")
        assert len({before, edited, self.key(inputs)}) == 3

    def test_a_missing_input_is_an_error(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="missing"):
            self.key([tmp_path / "missing"])


def test_json_is_sorted_rounded_and_whole(run: Run, tmp_path: Path):
    path = tmp_path / "metrics/probe.json"
    run.write_json(path, {"probe": {"top1": 1 / 3, "classes": 10}, "a": [12345.678, 2]})
    assert path.read_text().endswith("}\n")
    assert list(json.loads(path.read_text()).items()) == [
        ("a", [12345.7, 2]),
        ("probe", {"classes": 10, "top1": 0.333333}),
    ]
    for content in ({"top1": float("nan")}, {"top5": 1.0, "top1": [0.5, float("nan")]}):
        with pytest.raises(ValueError, match=r"probe\.json: top1: NaN is no result"):
            run.write_json(path, {"probe": content})
    with pytest.raises(ValueError, match=r"probe\.json: fid: -Infinity is no result"):
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
    runtime = RuntimeParams.model_validate(run.runtime.model_dump() | changes)
    return Run(stage=run.stage, root=run.root, runtime=runtime)


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
    with pytest.raises(ValueError, match="shards_from"):
        with_runtime(run, shards_from="bucket/demo")


@pytest.mark.parametrize(("seconds", "num_lines"), [(0.0, 6), (10.0, 2)])
def test_progress_in_a_log_file_is_lines(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    seconds: float,
    num_lines: int,
):
    """At the beginning, now and then, and at the end."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    with show_progress("pretrain", total=20, unit="img", shown=True) as advance:
        for _ in range(4):
            advance(5, loss=0.125)
    text = capfd.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == num_lines
    assert lines[0].startswith("pretrain:   0%")
    assert "20/20 [" in lines[-1]
    assert lines[-1].endswith("loss=0.125]")
