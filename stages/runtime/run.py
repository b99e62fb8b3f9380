"""One run of a stage: it reads its parameters, reports, resumes and fails clearly.

A stage reads:

class Params(Section): ...

def main(params: Params, run: Run) -> None: ...

if __name__ == "__main__":
execute(Params, main)
"""

from stages.runtime.launch import VARIABLE, start_several
from stages.runtime.progress import Advance, show_progress
from stages.runtime.work_dir import keep_until_success, key_of

import argparse
import inspect
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

from pydantic import Field

from contradiff.config import Section, parse, read_params
from contradiff.files import replace_file

if TYPE_CHECKING:
    from stages.runtime.tracking import LogMetrics

    import torch
    from accelerate import Accelerator

    from contradiff.processes import Processes
    from contradiff.types import Precision

PARAMS_FILE = Path("params.yaml")

SectionT = TypeVar("SectionT", bound=Section)


class RuntimeParams(Section):
    """What changes no result, and so is in no stage's `params` in dvc.yaml."""

    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: CUDA where there is one")
    num_workers: int = Field(ge=0, description="data-loading processes")
    log_every: int = Field(gt=0, description="steps between two logged losses")
    checkpoint_every: int = Field(gt=0, description="steps between two checkpoints of pretraining")
    shards_from: str | None = Field(
        default=None,
        pattern="^[a-z0-9+]+://.",
        description="URL of a folder with copies of build/shards and build/latents; null: build/",
    )


class RuntimeSection(Section):
    """The part of params.yaml that every stage reads besides its own."""

    runtime: RuntimeParams


@dataclass(frozen=True)
class Run:
    """One run of a stage: where things are, and how to report.

    Attributes:
        stage: its name.
        root: the project's folder, where raw data, mlflow.db and .work are. In DVC's temporary
            copies (`exp run --temp`, `--queue`) this is the *main* repository, while relative
            paths such as build/ are of the copy.
        runtime: settings that change no result.
        on_success: called in order after the stage has succeeded.
    """

    stage: str
    root: Path
    runtime: RuntimeParams
    on_success: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports; torchrun starts several."""
        return int(os.environ.get("RANK", "0")) == 0

    @property
    def device(self) -> "torch.device":
        """Where to compute; under torchrun each process has its own CUDA device.

        Raises:
            ValueError: runtime.device asks for CUDA and there is none.
        """
        import torch

        if self.runtime.device == "cpu":
            return torch.device("cpu")
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if self.runtime.device == "cuda":
            raise ValueError(
                "runtime.device: torch finds no CUDA device; use auto or cpu (got 'cuda')"
            )
        return torch.device("cpu")

    def accelerator(self, *, precision: "Precision" = "fp32") -> "Accelerator":
        """Join the processes that share the stage, if there are several.

        Raises:
            ValueError: they did not find each other.
        """
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        mixed = {"fp32": "no", "bf16": "bf16"}[precision]
        # Processes may wait for one that has more to do, for hours: torch's own limit is minutes.
        # One that dies is noticed by torchrun, which ends the others.
        patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
        accelerator = Accelerator(
            mixed_precision=mixed, cpu=self.device.type == "cpu", kwargs_handlers=[patience]
        )
        # Without CUDA, `accelerate launch` starts lone processes that all believe to be the first.
        if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
            raise ValueError(
                f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')} but Accelerate joined "
                f"{accelerator.num_processes} process; start by "
                f"`python -m stages.{self.stage}`, and choose by {VARIABLE}"
            )
        return accelerator

    def processes(self, accelerator: "Accelerator") -> "Processes":
        """Return which of the stage's processes this is, for `map_shards`."""
        from contradiff.processes import Processes

        return Processes(
            accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        )

    def resolve(self, path: str) -> Path:
        """Return a path of raw data: relative ones are relative to the project's root."""
        return self.root / path

    def shards(self, folder: Path) -> "Path | str":
        """Return where training reads a folder of shards: its namesake at runtime.shards_from."""
        if self.runtime.shards_from is None:
            return folder
        return f"{self.runtime.shards_from.rstrip('/')}/{folder.name}"

    def log(self, message: str) -> None:
        """Print one line on stderr, without breaking a progress bar."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(f"{self.stage}: {message}", file=sys.stderr)

    def progress(
        self, description: str, total: int | None, unit: str = "img"
    ) -> AbstractContextManager[Advance]:
        """Show how far the work is and how long it still takes: a bar, or now and then a line.

        Args:
            description: a word or two.
            total: number of units of the whole work, if known.
            unit: of what, in the singular.
        """
        return show_progress(
            f"{self.stage}: {description}", total=total, unit=unit, shown=self.is_main
        )

    def write_json(self, path: Path, content: Mapping[str, object]) -> None:
        """Write `content` whole or not at all: keys sorted, floats to six significant digits.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        if not self.is_main:
            return
        text = json.dumps(_rounded(content, key=str(path)), indent=2, sort_keys=True)
        with replace_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def work_dir(
        self,
        params: Mapping[str, object] | Section,
        inputs: Sequence[Path],
        *,
        state_version: int,
    ) -> AbstractContextManager[Path]:
        """Open a folder for checkpoints that the same work, begun again, finds as it was left.

        It is deleted when the block succeeds, and kept when it fails or is killed.

        Args:
            params: the parameters that decide the result, sections or values.
            inputs: the files and folders that decide the result.
            state_version: the STATE_VERSION of what is saved; other versions are begun anew.
        """
        key = key_of(self.stage, params=params, inputs=inputs)
        return keep_until_success(
            self.root / ".work" / self.stage / key,
            state_version=state_version,
            is_main=self.is_main,
            log=self.log,
        )

    def training_run(
        self,
        work_dir: Path,
        params: Mapping[str, object] | Section,
        *,
        files_checkpoint: bool,
    ) -> "AbstractContextManager[LogMetrics]":
        """Log metrics of a training live to MLflow; a resumed training goes on in the same run.

        Args:
            work_dir: of the training; keeps the run's id.
            params: to log.
            files_checkpoint: whether it makes build/pretrain, whose row this run then hangs under.

        Raises:
            ValueError: MLflow's store cannot be used. Later failures of it are only warned of.
        """
        from stages.runtime.tracking import training_run

        return training_run(
            self, work_dir=work_dir, params=params, files_checkpoint=files_checkpoint
        )


def _rounded(value: object, *, key: str) -> object:
    match value:
        case float():
            if not math.isfinite(value):
                raise ValueError(
                    f"{key}: {value} is no result; the computation diverged or had no data"
                )
            return float(f"{value:.6g}")
        case Mapping():
            return {
                str(name): _rounded(item, key=f"{key}: {name}")
                for name, item in value.items()  # pyright: ignore[reportUnknownVariableType]
            }
        case list() | tuple():
            return [_rounded(item, key=key) for item in value]  # pyright: ignore[reportUnknownVariableType]
        case _:
            return value


def execute(
    schema: type[SectionT],
    main: Callable[[SectionT, Run], None],
    *,
    stage: str | None = None,
    parallel: bool = False,
) -> None:
    """Run a stage from the command line, in the project's folder.

    Faults of the user (ValueError, OSError) end with one message and exit code 2; the variable
    CONTRADIFF_TRACEBACK=1 shows where they arose. SIGTERM ends with 143 after cleaning up.

    Args:
        schema: the sections of params.yaml that the stage depends on.
        main: the stage's work. Its module's `describe(params) -> str`, if there is one, adds to
            what `--dry-run` prints.
        stage: its name; by default that of the module that is run.
        parallel: whether several processes share the stage: one for each GPU, or as many as
            CONTRADIFF_NUM_PROCESSES says.
    """
    stage = stage or _name_of_main()
    arguments = _parse_arguments(stage, description=inspect.getdoc(inspect.getmodule(main)))
    signal.signal(signal.SIGTERM, _stop)
    try:
        started = time.perf_counter()
        content = read_params(PARAMS_FILE)
        params = parse(schema, content, source=str(PARAMS_FILE))
        runtime = parse(RuntimeSection, content, source=str(PARAMS_FILE)).runtime
        root = Path(os.environ.get("DVC_ROOT") or ".").resolve()
        run = Run(stage=stage, root=root, runtime=runtime)
        if arguments.dry_run:
            _show(params, describe=_own(main, "describe"))
            return
        if parallel:
            start_several(stage)
        main(params, run)
        seconds = time.perf_counter() - started
        run.log(f"done in {seconds:.1f} s")
        for call in run.on_success:
            call()
    except (ValueError, OSError) as error:
        if os.environ.get("CONTRADIFF_TRACEBACK") == "1":
            raise
        sys.exit(_complain(stage, error))
    except KeyboardInterrupt:
        print(f"contradiff: {stage}: interrupted", file=sys.stderr)
        sys.exit(130)


def _name_of_main() -> str:
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "stages are run as `python -m stages.NAME`"
    return spec.name.rpartition(".")[2]


def _parse_arguments(stage: str, *, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=description,
        epilog=f"Parameters are read from {PARAMS_FILE}; see presets/ for the values there are.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="validate and print the parameters, do nothing"
    )
    return parser.parse_args()


def _own(main: Callable[..., None], name: str) -> Callable[..., str] | None:
    """Return the function `name` of the module of `main`, unless the module only imported it."""
    function = getattr(inspect.getmodule(main), name, None)
    return function if getattr(function, "__module__", None) == main.__module__ else None


def _show(params: Section, *, describe: Callable[..., str] | None) -> None:
    from ruamel.yaml import YAML

    if values := params.model_dump(by_alias=True):
        YAML().dump(values, sys.stdout)  # pyright: ignore[reportUnknownMemberType]
    if describe is not None:
        print(describe(params))


def _complain(stage: str, error: ValueError | OSError) -> int:
    print(f"contradiff: {stage}: {error}", file=sys.stderr)
    return 2


def _stop(signum: int, _frame: object) -> NoReturn:
    """End as Python does on an interrupt, so that `finally` blocks and contexts are left."""
    raise SystemExit(128 + signum)
