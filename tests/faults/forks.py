"""Runs stages and DVC in forks of this process, which has imported the large libraries once.

A stage then starts in milliseconds instead of seconds. It is still a process of its own, with its
own environment, which a SIGKILL ends at once. DVC's stage is a fork of DVC, in its process group.
"""

import importlib
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.hook.sitecustomize import install
from tests.faults.project import STAGES, environment, log_of

LIBRARIES = (
    *("accelerate", "mlflow", "mlflow.store.tracking.sqlalchemy_store", "dvc.cli"),
    *("dvc.commands.repro", "dvc.repo.reproduce", "matplotlib.figure", "jinja2"),
    *("sklearn.linear_model", "sklearn.manifold", "sklearn.model_selection", "sklearn.pipeline"),
    *("diffusers.models.autoencoders.autoencoder_kl", "diffusers.schedulers.scheduling_ddim"),
    "diffusers.models.unets.unet_2d_condition",
)
"""What the stages import inside functions."""
SECONDS = 1800


def load_libraries() -> None:
    """Import all stages and what they use. Without threads, because a fork has only one."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name in (*(f"stages.{stage}" for stage in STAGES), *LIBRARIES):
        importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()


def run_fork(folder: Path, work: Callable[[], object], **variables: str) -> int:
    """Run `work` in the project with these variables; return its exit code, or minus its signal.

    The fork leads a process group. Its output goes to the project's log.
    """

    def in_project() -> object:
        os.setsid()
        os.chdir(folder)
        log = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(environment(folder, **variables))
        return work()

    return _fork(in_project)


def run_stage(stage: str) -> None:
    """Do what `python -m stages.<stage>` does."""
    install(stage)
    sys.dont_write_bytecode = True  # the disk may be full
    sys.argv = [f"stages.{stage}"]
    del sys.modules[f"stages.{stage}"]
    runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)


def repro(stage: str) -> int:
    """Do what `dvc repro` does for a single stage, which runs in a fork."""
    from dvc.cli import main
    from dvc.stage import run

    run._run = _run_command  # pyright: ignore[reportPrivateUsage]
    return main(["repro", "--single-item", "--no-run-cache", stage])


def _run_command(_shell: str, command: str, *, env: dict[str, str], **_: Any) -> None:
    """Do what DVC does for the command of a stage, `python -m stages.<stage>`."""
    from dvc.stage.exceptions import StageCmdFailedError

    def in_stage() -> object:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in [int(file.name) for file in Path("/proc/self/fd").iterdir()]:
            if number > 2:  # such as DVC's locks, which must end with DVC
                os.dup2(nowhere, number)
        os.environ.clear()
        os.environ.update(env)
        return run_stage(command.rpartition(".")[2])

    if code := _fork(in_stage):
        raise StageCmdFailedError(command, code)


def _fork(work: Callable[[], object]) -> int:
    """Run `work` in a fork; return its exit code, or minus its signal. It has half an hour."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code: object = 1
    try:
        signal.alarm(SECONDS)
        code = work()
    except SystemExit as error:
        code = error.code
    except BaseException as error:  # noqa: BLE001  # Python would print it too
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else isinstance(code, str))
