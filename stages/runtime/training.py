"""Shows a training's progress on stderr, logs its values in MLflow, and lets it resume."""

from stages.runtime.run import Run
from stages.runtime.tracking import training_run

import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tqdm import tqdm

from contradiff.config import Section
from contradiff.files import replace_file
from contradiff.signals import Stopped
from contradiff.watch import Watch

if TYPE_CHECKING:
    from torch.profiler import profile

OnStep = Callable[[int, Mapping[str, float] | None], None]
"""The type of the callback `on_step` of `contradiff.training.loop.train`."""
Log = Callable[[int, Mapping[str, float], Mapping[str, float]], None]
"""Gets a step, what the training reports of it, and what the watch has measured."""

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
NO_LOSSES = {"step", "epoch", "lr", "grad_norm"}
FORMATS: Mapping[str, Callable[[float], tuple[str, str]]] = {
    "eta_s": lambda value: ("left", tqdm.format_interval(value)),
    "images_per_s": lambda value: ("images/s", f"{value:.1f}"),
    "memory_gb": lambda value: ("memory", f"{value:.1f}GB"),
    "mfu": lambda value: ("MFU", f"{value:.0%}"),
    "waiting": lambda value: ("waiting", f"{value:.0%}"),
}
"""How a measured value is shown: name and text."""

WARMUP_STEPS, PROFILED_STEPS = 2, 10


class Session(TypedDict):
    """Keyword arguments for a function that trains. The arguments do not change the result."""

    work_dir: Path
    num_workers: int
    log_every: int
    checkpoint_every: int
    on_step: OnStep
    watch: Watch


@contextmanager
def follow_training(
    run: Run,
    params: Section,
    inputs: Sequence[Path],
    data_digest: str,
    state_version: int,
    *,
    watch: Watch,
    files_checkpoint: bool = False,
) -> Generator[Session]:
    """Open a training's work folder, MLflow run and progress bar; yield arguments for the trainer.

    An interrupted training is resumed if `params`, `inputs` and `data_digest` (the hash of the
    training images) are the same. Only pretraining sets `files_checkpoint` (see `training_run`).
    In MLflow, what `watch` measures has names that begin with "speed/".
    """
    shown, runtime = params.model_dump(mode="json", by_alias=True), run.runtime
    prefix = "train" if files_checkpoint else run.stage
    decisive = {**shown, "train": data_digest}
    with (
        run.work_dir(decisive, inputs, state_version=state_version) as work,
        training_run(run, work, shown, files_checkpoint=files_checkpoint) as log_metrics,
        profiled_steps(run, work.name) as count_step,
    ):

        def log(step: int, row: Mapping[str, float], measured: Mapping[str, float]) -> None:
            values = {f"{prefix}/{name}": row[name] for name in row if name != "step"}
            log_metrics(step, values | {f"speed/{name}": measured[name] for name in measured})

        with show_steps(run, "train", watch, log) as show:

            def on_step(step: int, row: Mapping[str, float] | None) -> None:
                show(step, row)
                count_step()

            yield Session(
                work_dir=work,
                num_workers=runtime.num_workers,
                log_every=runtime.log_every,
                checkpoint_every=runtime.checkpoint_every,
                on_step=on_step,
                watch=watch,
            )


@contextmanager
def debug_training(run: Run, watch: Watch) -> Generator[Session]:
    """Open a progress bar; yield arguments for a training that leaves no file and no MLflow run."""
    with tempfile.TemporaryDirectory() as folder, show_steps(run, "debug", watch) as on_step:
        try:
            yield Session(
                work_dir=Path(folder),
                num_workers=run.runtime.num_workers,
                log_every=1,
                checkpoint_every=watch.num_steps,
                on_step=on_step,
                watch=watch,
            )
        except Stopped as error:
            raise Stopped(error.number) from None  # what it has saved is deleted now


@contextmanager
def show_steps(
    run: Run, description: str, watch: Watch, log: Log = lambda *_: None
) -> Generator[OnStep]:
    """Show a progress bar; yield a callback that moves the bar to a step.

    The bar shows the losses of the last report and what `watch` has measured; `log` gets them too.
    """
    seen = 0
    with run.progress(description, watch.num_steps, "step", BAR) as advance:

        def on_step(step: int, row: Mapping[str, float] | None) -> None:
            nonlocal seen
            measured = watch.measure(step) if row is not None or seen == 0 else {}
            shown: dict[str, str] = {}
            if row is not None:
                log(step, row, measured)
                shown = {name: f"{row[name]:.3f}" for name in row if name not in NO_LOSSES}
                shown |= dict(FORMATS[name](measured[name]) for name in FORMATS if name in measured)
            advance(step - seen, **shown)
            seen = step

        yield on_step


@contextmanager
def profiled_steps(run: Run, key: str) -> Generator[Callable[[], None]]:
    """With `runtime.profile`, write a trace of ten steps; yield a function to call after each step.

    The first two steps are left out, because they also warm up. Only the main process is traced.
    """
    if not run.runtime.profile or not run.is_main:
        yield lambda: None
        return
    from torch import profiler

    path = run.root / ".work/profile" / f"{run.stage}-{key}.json.gz"

    def write(trace: "profile") -> None:
        with tempfile.TemporaryDirectory() as folder, replace_file(path) as temporary:
            packed = Path(folder, path.name)  # torch compresses a file of this name
            trace.export_chrome_trace(str(packed))
            shutil.copyfile(packed, temporary)
        where = "open it at https://ui.perfetto.dev or, in Chrome, at chrome://tracing"
        run.log(f"the trace of {PROFILED_STEPS} steps is in {path}; {where}")

    steps = profiler.schedule(wait=0, warmup=WARMUP_STEPS, active=PROFILED_STEPS, repeat=1)
    with profiler.profile(schedule=steps, on_trace_ready=write) as trace:
        yield trace.step
