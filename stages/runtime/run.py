"""Runs a stage: reads its parameters, shows progress and messages, and resumes unfinished work."""

from stages.runtime import STARTED
from stages.runtime.agreement import check_agreement
from stages.runtime.gpu_memory import how_to_need_less
from stages.runtime.launch import (
    VARIABLE,
    end_with_launcher,
    is_joined,
    is_new_message,
    is_one_of_several_launchers,
    is_started_here,
    num_processes,
    run_several,
)
from stages.runtime.missing import explain
from stages.runtime.passwords import hide_passwords
from stages.runtime.slurm import join_step, num_nodes, run_on_nodes
from stages.runtime.times import record_costs
from stages.runtime.work_dir import code_digest, finish, hold_part, key_of, lock_of, take_up

import argparse
import gc
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
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator
from tqdm import tqdm

import stages
from contradiff.config import Section, SectionT, parse, read_params
from contradiff.files import hold_lock, replace_file
from contradiff.imports import seconds_of_slow_imports
from contradiff.processes import Part, PartFinished, Processes
from contradiff.signals import Stopped, stop_at_once

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from contradiff.config import Precision

tqdm.get_lock()  # or tqdm makes it at its first use, and a signal would leave it half made

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
    earlier run had begun the work. `given` has the stage's parameters, for the comparison of
    several machines. With a `part`, the stage computes only this part of its shards.
    """

    stage: str
    root: Path
    runtime: RuntimeParams
    resumed: list[Path] = field(default_factory=list[Path])
    given: Mapping[str, object] = field(default_factory=dict[str, object])
    part: Part | None = None

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
        Raises ValueError if they ask for FSDP, DeepSpeed or another strategy, and if another
        machine has other code, parameters or folders.
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
        if accelerator.num_processes > 1:
            check_agreement(self.given, self.root)
        return accelerator

    def processes(self, accelerator: "Accelerator") -> Processes:
        """Return the rank of this process and the number of processes, for `map_shards`."""
        rank, size = accelerator.process_index, accelerator.num_processes
        return Processes(rank, size, accelerator.wait_for_everyone, self.part)

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

        Parts of the work (`part`) use the folder at the same time, and leave it as it is.
        """
        key = key_of(self.stage, params=params, inputs=inputs)
        folder = self.root / ".work" / self.stage / key
        folder.mkdir(parents=True, exist_ok=True)
        if not self.is_main:
            yield folder
            return
        if self.part is not None:
            lock = lock_of(self.root, self.stage, key)
            with hold_part(folder, lock, part=self.part, state_version=state_version):
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
    has_parts: bool = False,
    debug: Debug[SectionT] | None = None,
) -> None:
    """Run a stage from the command line, in the project's folder.

    If the stage's module has a function `describe(params) -> str`, `--dry-run` prints its result.
    If `parallel` is true, several processes can share the stage (see `launch` and `slurm`): one for
    each GPU, or `without_gpu(params)` of them. If `has_parts` is true, `main` always calls
    `map_shards`, so that `--part 3/16` can compute a part of the shards. `--debug M` calls
    `debug(M, ...)` instead of `main`. After a ValueError or OSError, only the error's message is
    printed, and the exit code is 2. CONTRADIFF_TRACEBACK=1 shows the traceback. After a signal, the
    exit code is 128 + its number.
    """
    gc.enable()  # it has slept since stages/__init__.py
    module = sys.modules["__main__"]
    assert module.__spec__ is not None, "stages are run as `python -m stages.NAME`"
    stage = module.__spec__.name.rpartition(".")[2]
    given = {"has_debug": debug is not None, "has_parts": has_parts}
    options = _read_arguments(stage, inspect.getdoc(module), **given)
    mode = options.debug
    work = main if mode is None or debug is None else partial(debug, mode)
    sys.excepthook = _print_traceback
    stop_at_once()
    end_with_launcher()
    try:
        started = time.perf_counter()
        content = read_params(PARAMS_FILE)
        params = parse(schema, content, source=str(PARAMS_FILE))
        runtime = parse(RuntimeSection, content, source=str(PARAMS_FILE)).runtime
        if options.dry_run:
            _show(params, describe=getattr(module, "describe", None))
            return
        root = Path(os.environ.get("DVC_ROOT") or ".").resolve()
        join_step()
        if parallel:
            code = _run_in_others(module.__spec__.name, root, without_gpu=without_gpu(params))
            if code is not None:
                sys.exit(code)
        given = params.model_dump(mode="json", by_alias=True)
        run = Run(stage, root, runtime, given=given, part=options.part)
        if not parallel and not run.is_main:
            return  # process 0 does the work of a stage that several processes cannot share
        try:
            work(params, run)
        except PartFinished:
            run.log(f"part {run.part} is finished; without --part, the stage gathers all parts")
        else:
            later_imports = seconds_of_slow_imports()
            seconds, imports = time.perf_counter() - started - later_imports, started - STARTED
            if run.is_main and not run.resumed and mode is None:
                record_costs(run.root, stage, params, seconds=seconds)
            run.log(f"done in {seconds:.1f} s, and {imports + later_imports:.1f} s of imports")
        leave_processes()
    except (ValueError, OSError, Stopped, RuntimeError) as error:
        text, code = _explain(error, stage)
    else:
        stages.has_succeeded = True
        return
    message = f"contradiff: {stage}: {hide_passwords(text)}"
    if text and is_new_message(message):
        print(message, file=sys.stderr)
    if is_joined():
        sys.stderr.flush()
        os._exit(code)  # gloo's threads would abort the process during a normal exit
    sys.exit(code)


def _show(params: Section, *, describe: Callable[..., str] | None) -> None:
    from ruamel.yaml import YAML

    if values := params.model_dump(by_alias=True):
        YAML().dump(values, sys.stdout)  # pyright: ignore[reportUnknownMemberType]
    if describe:
        print(describe(params))


def _run_in_others(module: str, root: Path, *, without_gpu: int) -> int | None:
    """Run a parallel stage in processes that this one starts. None: it must do the work itself."""
    if (nodes := num_nodes()) > 1:
        return run_on_nodes(module, nodes=nodes, root=root)
    if (count := num_processes(without_gpu=without_gpu)) > 1 or is_one_of_several_launchers():
        return run_several(module, count=count)
    return None


def _explain(error: BaseException, stage: str) -> tuple[str, int]:
    """Return the message (empty: another process has it) and the exit code; raise a bug again."""
    if isinstance(error, ValueError | OSError) and os.environ.get("CONTRADIFF_TRACEBACK") != "1":
        return explain(error), 2
    if isinstance(error, Stopped):
        is_shown = error.saved or not is_started_here()
        return str(error) if is_shown else "", 128 + error.number
    if type(error).__name__ == "OutOfMemoryError":  # torch's, but torch may not be loaded
        return how_to_need_less(stage, error), 2
    # torch has no class for this error, which comes from gloo, NCCL or the store.
    if is_joined() and re.search(_LOST_CONNECTION, str(error)) and isinstance(error, RuntimeError):
        # The process that has ended says why; if it was killed, the one that has started it does.
        return "" if is_started_here() else "another process has ended", 2
    raise error


@dataclass(frozen=True)
class _Options:
    dry_run: bool
    debug: str | None = None
    part: Part | None = None


def _read_arguments(
    stage: str, description: str | None, *, has_debug: bool, has_parts: bool
) -> _Options:
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
    how = "compute the third of sixteen parts of the shards, for array jobs; without this option, "
    how += "the stage then gathers all parts"
    parser.add_argument("--part", metavar="3/16", help=how if has_parts else argparse.SUPPRESS)
    given = vars(parser.parse_args())
    options, part = _Options(given["dry_run"], given.get("debug")), given["part"]
    for option, value in (("--debug", options.debug), ("--part", part)):
        if value and "DVC_ROOT" in os.environ:
            command = f"python -m stages.{stage} {option} {value}"
            what = f"{option} writes no result"
            parser.error(f"{what}, so DVC must not start it; type `{command}`")
    if part is not None and not has_parts:
        parser.error("--part: the work of this stage cannot be divided into parts")
    try:
        return replace(options, part=part and Part.parse(part))
    except ValueError as error:
        parser.error(f"--part: {error}")


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


def leave_processes() -> None:
    """Close the connections to other processes. Open connections can abort Python at its exit."""
    if is_joined():
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
