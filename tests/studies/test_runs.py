"""A study of six members and two that fail is killed twice, and then finished by real DVC."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from bench._copies import copy_project
from contradiff.studies.members import changed
from contradiff.studies.queue import list_tasks
from tests.settings import TINY
from tests.studies.project import git, yaml

STUDY = """
question: Does λ matter?
paper: ''
differences: []
seeds: [0, 1]
targets: [STAGE]
fixed: {}
columns:
  value: {title: value, key: KEY, format: ".1f", better: up}
rows:
- {title: zero, set: {loss.lambda: 0}}
- {title: tenth, set: {loss.lambda: 0.1}}
- {title: one, set: {loss.lambda: 1}}
- {title: bad, set: {latents.min_psnr: 99.0}}
baseline: zero
curve: [value]
bubble: null
samples: false
"""
COMMAND = [sys.executable, "-c", "from contradiff.cli.app import app; app()", "study", "six"]
VALUES = {"small": "probe.top1", "smoke": "pretrain.trainable"}
"""Project => what the study reads. Its stage is the study's target."""
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 3600.0

PIPELINE = """
stages:
  shard: {cmd: python work.py shard, deps: [work.py], params: [seed, latents], outs: [build/shards]}
  pretrain:
    cmd: python work.py pretrain
    deps: [build/shards, work.py]
    params: [seed, loss]
    outs: [build/pretrain]
  probe:
    cmd: python work.py probe
    deps: [build/pretrain, work.py]
    params: [seed, probe]
    metrics: [metrics/probe.json: {cache: false}]
"""
WORK = """
import json, os, sys, time
from pathlib import Path
from ruamel.yaml import YAML
stage = sys.argv[1]
params = YAML(typ="safe").load(Path("params.yaml"))
if params["latents"]["min_psnr"] > 90:
    sys.exit("latents.min_psnr: no VAE is that good")
note = Path(os.environ["DVC_ROOT"], ".work", stage, "key", "begun.json")
note.parent.mkdir(parents=True, exist_ok=True)
note.write_text("{}")
time.sleep(3)
out = {"shard": "build/shards", "pretrain": "build/pretrain", "probe": "metrics/probe.json"}[stage]
Path(out).parent.mkdir(exist_ok=True)
top1 = 0.7 + params["loss"]["lambda"] / 10 + params["seed"] / 100
Path(out).write_text(json.dumps({"probe": {"top1": top1, "total": 100}}))
print(f"{stage}: done in 3.0 s")
"""


@pytest.fixture(params=["small", "smoke"])
def project(
    request: pytest.FixtureRequest,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Generator[Path]:
    """A project in git and DVC: a pipeline that only waits, or the real one with little to do."""
    folder = tmp_path / "project"
    if request.param == "smoke":
        copy_project(folder)
        shutil.copyfile(folder / "presets/smoke.yaml", folder / "params.yaml")
        for path in folder.glob("studies/**/*.*"):
            path.unlink()
        command = ["dvc", "config", "--local", "--unset", "core.no_scm"]
    else:
        params = changed(TINY, {"base.path": str(tiny_base)}, where="")
        files = {"dvc.yaml": PIPELINE, "work.py": WORK, "params.yaml": yaml(params).decode()}
        files[".gitignore"] = "/.work\n/build\n"
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "studies").mkdir()
        command = ["dvc", "init", "-q"]
    stage, key = VALUES[request.param].partition(".")[0], VALUES[request.param]
    study = STUDY.replace("STAGE", stage).replace("KEY", key)
    (folder / "studies/six.yaml").write_text(study, encoding="utf-8")
    bin_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(folder if request.param == "smoke" else ROOT))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    git(folder, "init", "-q")
    for key in ("user.name", "user.email"):
        git(folder, "config", key, "x")
    subprocess.run(command, cwd=folder, check=True)
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "begin")
    yield folder
    kill_all(folder)


def processes(project: Path) -> list[psutil.Process]:
    """Return DVC's workers of a project and what runs in its experiments, with all children."""
    found: dict[int, psutil.Process] = {}
    for note in (project / ".dvc/tmp/exps").glob("*/**/*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
            process = psutil.Process(int(json.loads(note.read_text())["pid"]))
            if "dvc" in " ".join(process.cmdline()):
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return list(found.values())


def stop_when(project: Path, condition: Callable[[], bool], number: signal.Signals) -> int:
    """Start the study; once `condition` holds, signal its process group; return its exit code."""
    command = [*COMMAND, "--run", "-j", "2"]
    with subprocess.Popen(command, cwd=project, start_new_session=True) as study:
        try:
            limit = time.monotonic() + SECONDS
            while not condition():
                assert study.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.5)
            os.killpg(study.pid, number)
            return study.wait(60)
        finally:
            study.kill()


def kill_all(project: Path) -> None:
    """Kill DVC's workers and what they run, as a crash of the machine does."""
    for process in processes(project):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def experiments(project: Path) -> list[str]:
    names = git(project, "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps").split()
    return [name for name in names if name.startswith("six-")]


@pytest.mark.slow
def test_a_study_that_is_killed_twice_is_finished(project: Path):
    has_begun = lambda: any(project.glob(".work/pretrain/*/begun.json"))  # noqa: E731
    assert stop_when(project, has_begun, signal.SIGKILL) == -signal.SIGKILL
    kill_all(project)
    assert experiments(project) == []
    # Ctrl-C ends the command alone: the workers go on.
    assert stop_when(project, lambda: bool(experiments(project)), signal.SIGINT) == 130
    before = experiments(project)
    assert processes(project)
    done = subprocess.run(
        [*COMMAND, "--run", "-j", "2"], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.split(" members are done\n", 1)[1].splitlines()  # after the run
    assert sum(line.startswith("done ") for line in lines) == 6, done.stdout
    assert set(before) <= set(experiments(project))
    assert len(experiments(project)) == 6
    ends = [task.digest for task in list_tasks(project) if task.state == "done"]
    assert len(ends) == len(set(ends)) == 6  # no member ran twice to its end
    failed = [line for line in lines if line.startswith("failed ")]
    assert len(failed) == 2, done.stdout
    log = project / failed[0].rpartition(" ")[2]
    assert "min_psnr" in log.read_text()

    shown = subprocess.run(
        [*COMMAND, "--dry-run"], cwd=project, capture_output=True, text=True, check=True
    )
    assert shown.stdout.count("dvc exp run --queue -n six-min_psnr99.0") == 2
    subprocess.run([*COMMAND, "--report"], cwd=project, check=True)
    page = (project / "docs/studies/six.md").read_text()
    assert "6 experiments on commit" in page
    assert "- bad (`latents.min_psnr=99.0`): seed 0, 1" in page
