"""A small finished project, whose stages the fault programs run again."""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench._copies import ROOT, copy_project, run_in
from contradiff.config import read_params
from tests.settings import write_tiny_base

HOOK = Path(__file__).with_name("hook")
_DIGEST = (sys.executable, "-c", "from stages.runtime import work_dir as w; print(w.code_digest())")
STAGES = (
    *("validate", "prepare", "shard", "base", "latents", "pretrain", "class_condition", "features"),
    *("baselines", "probe", "transfer", "separability", "conditions", "generate", "extractor"),
    *("reference", "score", "report", "track"),
)
"""All stages that `dvc repro` runs, in an order that it could take."""
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "data": {"num_train": 240},
    "base": {"path": "models/random"},
    "latents": {"min_psnr": 0.0},
    "probe": {"few_labels": [0.5]},
    "class_condition": {"epochs": 1},
    "generate": {"condition": "image"},
    "runtime": {"checkpoint_every": 2},
}
"""The parameters that differ from presets/smoke.yaml: so each stage has work, and takes seconds."""


@dataclass(frozen=True)
class Project:
    """A finished project, and the contents of its outs and of dvc.lock when it was finished.

    `writes` lists the names of each stage's writes, in order.
    """

    folder: Path
    outs: Mapping[str, Mapping[str, bytes]]
    writes: Mapping[str, Sequence[str]]
    lock: bytes

    @classmethod
    def open(cls, folder: Path) -> "Project":
        """Open the project in `folder`; if there is none, make it (2 to 4 minutes)."""
        writes = folder.with_name(f"{folder.name}.writes")
        if not (folder / "build/report/index.html").is_file():
            print(f"running the pipeline in {folder}", file=sys.stderr, flush=True)
            writes.unlink(missing_ok=True)
            copy_project(folder)
            write_tiny_base(folder / "models/random")
            params = read_params(folder / "presets/smoke.yaml")
            for section, values in CHANGES.items():
                params[section].update(values)
            YAML().dump(params, folder / "params.yaml")
            run_in(folder, sys.executable, "-m", "compileall", "-q", "contradiff", "stages")
            command = ["dvc", "repro"]
            run_in(folder, *command, environment=environment(folder, FAULTS_WRITES=str(writes)))
        if run_in(folder, *_DIGEST) != run_in(ROOT, *_DIGEST):
            raise SystemExit(f"{folder} was made with other code; delete this folder")
        noted = [line.split(" ", 1) for line in writes.read_text().splitlines()]
        by_stage = {stage: [name for own, name in noted if own == stage] for stage in STAGES}
        outs = {stage: read_outs(folder, stage) for stage in STAGES}
        return cls(folder, outs, by_stage, (folder / "dvc.lock").read_bytes())

    def copy(self, folder: Path) -> "Project":
        """Return a copy of the project in `folder`."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return replace(self, folder=folder)

    def forget(self, stage: str) -> None:
        """Return to the moment before `stage` ran, with an empty MLflow store."""
        self.delete_outs(stage)
        for name in (".work", "mlruns", *(["data"] if stage == "prepare" else [])):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        # The rwlock names killed processes, whose numbers Linux may have given to others by now.
        for name in ("mlflow.db", ".dvc/tmp/rwlock"):
            (self.folder / name).unlink(missing_ok=True)
        yaml = YAML(typ="safe")
        content = yaml.load(self.lock)
        content["stages"].pop(stage, None)
        yaml.dump(content, self.folder / "dvc.lock")

    def delete_outs(self, stage: str) -> None:
        """Delete the outs of a stage, as DVC does before it runs the stage."""
        for out in outs_of(self.folder, stage):
            path = self.folder / out
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def differences(self, stage: str) -> Iterator[str]:
        """Yield the files of the stage's outs that differ from the finished project's."""
        now, then = read_outs(self.folder, stage), self.outs[stage]
        for name in sorted(now.keys() | then.keys()):
            if now.get(name) != then.get(name):
                missing = "missing" if name not in now else "new" if name not in then else "differs"
                yield f"{name}: {missing}"

    def held_locks(self) -> Iterator[str]:
        """Yield the lock files that a process still holds, and DVC's if its process lives."""
        for lock in self.folder.glob(".work/locks/*"):
            with lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield f"{lock.name}: held"
        rwlock = self.folder / ".dvc/tmp/rwlock"
        for pid in re.findall(r'"pid": (\d+)', rwlock.read_text() if rwlock.is_file() else ""):
            if Path("/proc", pid).exists():
                yield f".dvc/tmp/rwlock: held by process {pid}"


def read_options(name: str, documentation: str | None, arguments: Sequence[str]) -> Any:
    """Parse the arguments of the programs that disturb stages."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.faults {name}", description=documentation
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--project", type=Path)
    return parser.parse_args(arguments)


def outs_of(folder: Path, stage: str) -> list[str]:
    """Return the paths of a stage's outs, metrics and plots in dvc.yaml."""
    section: dict[str, Any] = read_params(folder / "dvc.yaml")["stages"][stage]
    items = [item for kind in ("outs", "metrics", "plots") for item in section.get(kind, [])]
    return [next(iter(item)) if isinstance(item, Mapping) else item for item in items]


def read_outs(folder: Path, stage: str) -> dict[str, bytes]:
    """Return the content of each file in a stage's outs."""
    found: dict[str, bytes] = {}
    for out in outs_of(folder, stage):
        path = folder / out
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a run in the project, with the hook.

    A stage is one process, so that the hook kills the process that the programs wait for, and
    pretraining adds in the same order. tests/stages/runtime/test_nodes.py kills several processes.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    kept |= {"PYTHONPATH": f"{HOOK}{os.pathsep}{folder}", "GIT_CEILING_DIRECTORIES": str(folder)}
    kept["DVC_SITE_CACHE_DIR"] = str(folder.with_name(f"{folder.name}.site-cache"))
    return kept | {"CONTRADIFF_NUM_PROCESSES": "1"} | variables


def start(folder: Path, *command: str, **variables: str) -> "subprocess.Popen[bytes]":
    """Start a command in the project, as the leader of a process group, with output to a file."""
    with log_of(folder).open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder, **variables),
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def log_of(folder: Path) -> Path:
    """Return the file with the output of the last command that `start` has started."""
    return folder.with_name(f"{folder.name}.log")
