"""Runs a stage: reads its parameters, shows progress and messages, and resumes unfinished work."""

from stages.runtime import STARTED
from stages.runtime.launch import (
    VARIABLE,
    is_new_message,
    is_started_here,
    num_processes,
    run_several,
)
from stages.runtime.missing import explain
from stages.runtime.passwords import hide_passwords
from stages.runtime.times import record_costs
from stages.runtime.work_dir import code_digest, finish, key_of, lock_of, take_up

import argparse
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator
from tqdm import tqdm

from contradiff.config import Section, SectionT, parse, read_params
from contradiff.files import hold_lock, replace_file
from contradiff.processes import Processes
from contradiff.signals import Stopped, stop_at_once

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from contradiff.types import Precision

PARAMS_FILE = Path("params.yaml")
SECONDS_BETWEEN_LINES = 10.0
STRATEGIES = {
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"),
    *("ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_SAGEMAKER"),
}
"""Environment variables that ask Accelerate for a training strategy."""
_LOST_CONNECTION = "(?i)closed by peer|reset by peer|broken pipe|pair closure|remote process exited"

DEBUG_MODES = ("overfit", "two-batches", "anomaly")
"""What `--debug` can find faults with, in stages that have it."""

Debug = Callable[[str, SectionT, "Run"], None]
"""Runs a stage in one of `DEBUG_MODES`, and writes no file."""

Advance = Callable[..., None]
"""`advance(n, name=value, ...)` moves a progress bar by n units and shows the named values."""


class RuntimeParams(Section):
    """Section `runtime`. It changes no result, so no stage in dvc.yaml depends on this section."""

    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: CUDA if there is a GPU")
    num_workers: int = Field(ge=0, description="workers that load data")
    log_every: int = Field(gt=0, description="steps between two logged losses")
    checkpoint_every: int = Field(gt=0, description="steps between two checkpoints of a training")
    compile: Literal["none", "sampling", "all"] = Field(
        default="none", description="which stages compile the UNet; all: also training and features"
    )
    keep_every: int = Field(
        default=0, ge=0, description="steps between two kept checkpoints of pretraining; 0: none"
    )
    profile: bool = Field(
        default=False, description="whether a training leaves a trace of ten steps in .work/profile"
    )
    shards_from: str | None = Field(
        default=None,
        pattern="^[a-z0-9+]+://.",
        description="URL of a folder with copies of build/shards and build/latents; null: build/",
    )

    @field_validator("shards_from")
    @classmethod
    def _has_no_password(cls, url: str | None) -> str | None:
        if url is not None and hide_passwords(url) != url:
            where = "give it in the environment, or in the configuration of s3fs, gcsfs or ~/.netrc"
            raise ValueError(f"the URL has a password, which git and DVC would keep; {where}")
        return url


class RuntimeSection(Section):
    """The section that every stage reads in addition to its own sections."""

    runtime: RuntimeParams


class _LogFile(StringIO):
    """Prints each progress line of tqdm on a new line, for an output that is not a terminal."""

    def write(self, text: str) -> int:
        if status := text.strip():
            print(status, file=sys.stderr, flush=True)
        return len(text)


@dataclass(frozen=True)
class Run:
    """One run of a stage: its settings, and functions to show progress and messages.

    `root` is the project's folder, with raw data, mlflow.db and .work. `dvc exp run --temp` and
    `--queue` run a stage in a temporary copy. `root` is then still the original project, but
    relative paths such as build/ belong to the copy. `resumed` lists the work folders in which an
    earlier run had begun the work.
    """

    stage: str
    root: Path
    runtime: RuntimeParams
    resumed: list[Path] = field(default_factory=list[Path])

    @property
    def is_main(self) -> bool:
        """Whether this is the process (rank 0) that writes files and prints messages."""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def device(self) -> "torch.device":
        """The device for computations. With several processes, each has its own CUDA device."""
        import torch

        has_cuda = self.runtime.device != "cpu" and torch.cuda.is_available()
        if self.runtime.device == "cuda" and not has_cuda:
            fault = 'the value is "cuda", but torch finds no CUDA device'
            raise ValueError(f'runtime.device: {fault}; set runtime.device to "auto" or "cpu"')
        if not has_cuda:
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def accelerator(self, *, precision: "Precision" = "fp32") -> "Accelerator":
        """Connect this process with the others of the stage; raise ValueError if that fails.

        Accelerate would read many settings from environment variables, such as
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS. They are removed, so that params.yaml alone decides.
        Raises ValueError if they ask for FSDP, DeepSpeed or another strategy.
        """
        if ignored := drop_accelerates_variables():
            self.log(f"ignored, because params.yaml decides: {', '.join(ignored)}")
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        # A process may wait hours for a slower one, but torch's default limit is minutes. A short
        # limit is not needed: if a process dies, the launcher ends the others.
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=self.device.type == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        )
        # Without CUDA, `accelerate launch` does not connect its processes.
        if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
            raise ValueError(
                f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but Accelerate found "
                f"{accelerator.num_processes} process; start the stage with "
                f"`python -m stages.{self.stage}`, and set {VARIABLE} to the number of processes"
            )
        return accelerator

    def processes(self, accelerator: "Accelerator") -> Processes:
        """Return the rank of this process and the number of processes, for `map_shards`."""
        rank, size = accelerator.process_index, accelerator.num_processes
        return Processes(rank, size, accelerator.wait_for_everyone)

    def resolve(self, path: str) -> Path:
        """Return the full path of raw data. A relative path in params.yaml starts at `root`."""
        return self.root / path

    def shards(self, folder: Path) -> "Path | str":
        """Return where training reads shards: `folder`, or its copy at `runtime.shards_from`."""
        if self.runtime.shards_from is None:
            return folder
        return f"{self.runtime.shards_from.rstrip('/')}/{folder.name}"

    def log(self, message: str) -> None:
        """Print a line on stderr, in the main process only."""
        if self.is_main:
            tqdm.write(f"{self.stage}: {hide_passwords(message)}", file=sys.stderr)

    @contextmanager
    def progress(
        self,
        description: str,
        total: int | None,
        unit: str = "img",
        bar_format: str | None = None,
    ) -> Generator[Advance]:
        """Show progress on stderr: a bar in a terminal, or a line every ten seconds elsewhere.

        `bar_format` is tqdm's; None: tqdm's default.
        """
        is_terminal = sys.stderr.isatty()
        with tqdm(
            desc=f"{self.stage}: {description}",
            total=total,
            unit=unit,
            disable=not self.is_main,
            file=sys.stderr if is_terminal else _LogFile(),
            mininterval=0.1 if is_terminal else SECONDS_BETWEEN_LINES,
            miniters=1,
            dynamic_ncols=is_terminal,
            bar_format=bar_format,
        ) as bar:

            def advance(n: int, /, **postfix: float | str) -> None:
                if postfix:
                    bar.set_postfix(postfix, refresh=False)
                bar.update(n)

            yield advance

    def write_json(self, path: Path, content: Mapping[str, object]) -> None:
        """Write JSON, floats with six digits; raise ValueError if a float is NaN or infinite."""
        if not self.is_main:
            return
        text = json.dumps(content)
        if unusable := re.search(r'"([^"]*)": [^"]*?(NaN|-?Infinity)', text):
            why = "the computation diverged or had no data"
            raise ValueError(f"{path}: {unusable[1]}: {unusable[2]} is not a result; {why}")
        rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))
        with replace_file(path) as temporary:
            text = hide_passwords(json.dumps(rounded, indent=2, sort_keys=True))
            temporary.write_text(text + "\n", encoding="utf-8")

    @contextmanager
    def work_dir(
        self, params: Mapping[str, object] | Section, inputs: Sequence[Path], *, state_version: int
    ) -> Generator[Path]:
        """Open a folder for unfinished work, which the next run finds after an interruption.

        The next run must have the same `params`, and the same content of the files and folders
        `inputs`. A folder of another `state_version` is emptied. If another run uses the folder,
        this run waits. After the block, the folder is deleted, unless the block failed.

        If DVC has started this run, finished work stays until the stage `track`, because DVC may be
        killed before it records the result. A later run of DVC, or a run that has waited, takes the
        finished work over.
        """
        key = key_of(self.stage, params=params, inputs=inputs)
        folder = self.root / ".work" / self.stage / key
        folder.mkdir(parents=True, exist_ok=True)
        if not self.is_main:
            yield folder
            return
        code, by_dvc = code_digest(), "DVC_ROOT" in os.environ
        take_over = by_dvc

        def wait(pid: str) -> None:
            nonlocal take_over
            take_over = True
            self.log(f"waiting for process {pid}, which is doing the same work")

        with hold_lock(lock_of(self.root, self.stage, key), on_wait=wait):
            usable = code if take_over else None
            if take_up(folder, state_version=state_version, code=usable, log=self.log):
                self.resumed.append(folder)
            yield folder
            if by_dvc:
                finish(folder, code=code)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def execute(
    schema: type[SectionT],
    main: Callable[[SectionT, Run], None],
    *,
    parallel: bool = False,
    without_gpu: Callable[[SectionT], int] = lambda _: 1,
    debug: Debug[SectionT] | None = None,
) -> None:
    """Run a stage from the command line, in the project's folder.

    If the stage's module has a function `describe(params) -> str`, `--dry-run` prints its result.
    If `parallel` is true, several processes can share the stage (see `launch`): one for each GPU,
    or `without_gpu(params)` of them. `--debug M` calls `debug(M, ...)` instead of `main`. After a
    ValueError or OSError, only the error's message is printed, and the exit code is 2.
    CONTRADIFF_TRACEBACK=1 shows the traceback. After a signal, the exit code is 128 + its number.
    """
    module = sys.modules["__main__"]
    assert module.__spec__ is not None, "stages are run as `python -m stages.NAME`"
    stage = module.__spec__.name.rpartition(".")[2]
    is_dry, mode = _read_arguments(stage, inspect.getdoc(module), has_debug=debug is not None)
    work = main if mode is None or debug is None else partial(debug, mode)
    sys.excepthook = _print_traceback
    stop_at_once()
    try:
        started = time.perf_counter()
        content = read_params(PARAMS_FILE)
        params = parse(schema, content, source=str(PARAMS_FILE))
        runtime = parse(RuntimeSection, content, source=str(PARAMS_FILE)).runtime
        if is_dry:
            from ruamel.yaml import YAML

            if values := params.model_dump(by_alias=True):
                YAML().dump(values, sys.stdout)  # pyright: ignore[reportUnknownMemberType]
            if describe := getattr(module, "describe", None):
                print(describe(params))
            return
        if parallel and (count := num_processes(without_gpu=without_gpu(params))) > 1:
            sys.exit(run_several(module.__spec__.name, count=count))
        run = Run(stage, Path(os.environ.get("DVC_ROOT") or ".").resolve(), runtime)
        work(params, run)
        seconds = time.perf_counter() - started
        if run.is_main and not run.resumed and mode is None:
            record_costs(run.root, stage, params, seconds=seconds)
        run.log(f"done in {seconds:.1f} s, after {started - STARTED:.1f} s of imports")
        leave_processes()
        return
    except (ValueError, OSError) as error:
        if os.environ.get("CONTRADIFF_TRACEBACK") == "1":
            raise
        text, code = explain(error), 2
    except Stopped as error:
        is_shown = error.saved or not is_started_here()
        text, code = str(error) if is_shown else "", 128 + error.number
    except RuntimeError as error:
        # torch has no class for this error, which comes from gloo, NCCL or the store.
        if not is_joined() or not re.search(_LOST_CONNECTION, str(error)):
            raise
        # The process that has ended says why; if it was killed, the one that has started it does.
        text, code = "" if is_started_here() else "another process has ended", 2
    message = f"contradiff: {stage}: {hide_passwords(text)}"
    if text and is_new_message(message):
        print(message, file=sys.stderr)
    if is_joined():
        sys.stderr.flush()
        os._exit(code)  # gloo's threads would abort the process during a normal exit
    sys.exit(code)


def _read_arguments(
    stage: str, description: str | None, *, has_debug: bool
) -> tuple[bool, str | None]:
    """Return whether the command line has --dry-run, and the mode of --debug or None."""
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=description,
        epilog=f"The stage reads its parameters from {PARAMS_FILE}; presets/ has examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dry = "only check the parameters and print them"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    if has_debug:
        how = "look for faults, and write no file: train on one batch again and again, or on the "
        how += "same two batches in each epoch, or name the operation whose gradient is NaN"
        parser.add_argument("--debug", choices=DEBUG_MODES, help=how)
    given = vars(parser.parse_args())
    mode = given.get("debug")
    if mode and "DVC_ROOT" in os.environ:
        command = f"python -m stages.{stage} --debug {mode}"
        parser.error(f"--debug writes no result, so DVC must not start it; type `{command}`")
    return given["dry_run"], mode


def drop_accelerates_variables() -> list[str]:
    """Remove Accelerate's settings from this process's environment; return their names and values.

    Raises ValueError if a variable asks for a training strategy that this project does not have.
    """
    settings = {name: os.environ[name] for name in os.environ if name.startswith("ACCELERATE_")}
    for name, value in settings.items():
        if name in STRATEGIES and value.lower() not in {"", "0", "false", "no", "off"}:
            raise ValueError(
                f"the environment variable {name} is {value}, but the stages only have plain data "
                f"parallelism; type `unset {name}`, or start the stage without `accelerate launch`"
            )
        del os.environ[name]
    return [f"{name}={value}" for name, value in sorted(settings.items())]


@contextmanager
def say_how_to_restore_params() -> Generator[None]:
    """Add a line to a ValueError: DVC leaves a refused `-S` in params.yaml, for the next run too.

    The line is missing if params.yaml is as in the last commit, or in DVC's temporary copy.
    """
    try:
        yield
    except ValueError as error:
        is_copy = Path(os.environ.get("DVC_ROOT") or ".").resolve() != Path.cwd()
        if is_copy or not shutil.which("git"):
            raise
        command = ["git", "status", "--porcelain", "--", str(PARAMS_FILE)]
        state = subprocess.run(command, capture_output=True, check=False).stdout
        if not state.strip().startswith(b"M"):  # not modified, or no repository
            raise
        raise ValueError(
            f"{error}\n{PARAMS_FILE} keeps refused values for the next run, also those of -S. "
            f"Correct them, or go back to the last commit's file: git checkout {PARAMS_FILE}"
        ) from error


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an unexpected error as Python does, but without passwords in URLs."""
    lines = traceback.format_exception(kind, error, trace)
    print(hide_passwords("".join(lines)), end="", file=sys.stderr)


def is_joined() -> bool:
    """Return whether torch.distributed has connected this process with others."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def leave_processes() -> None:
    """Close the connections to other processes. Open connections can abort Python at its exit."""
    if is_joined():
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
