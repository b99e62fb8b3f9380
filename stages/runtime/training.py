"""A training as its user follows it: progress on stderr, values in MLflow, work that resumes."""

from stages.runtime.progress import Advance
from stages.runtime.run import Run
from stages.runtime.tracking import training_run

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

OnStep = Callable[[int, Mapping[str, float] | None], None]
"""The callback of `contradiff.training.loop.train`."""


@contextmanager
def follow_training(
    run: Run,
    params: Mapping[str, object],
    inputs: Sequence[Path],
    *,
    data_digest: str,
    state_version: int,
    num_steps: int,
    prefix: str,
    files_checkpoint: bool,
) -> Generator[tuple[Path, OnStep]]:
    """Open a training's folder, MLflow run and progress bar; yield the folder and the callback.

    `params`, `inputs` and the training split's `data_digest` decide the result, so they name the
    folder. Names of metrics begin with `prefix`. `files_checkpoint` is that of `training_run`.
    """
    decisive = {**params, "train": data_digest}
    with (
        run.work_dir(decisive, inputs, state_version=state_version) as work,
        training_run(run, work, params, files_checkpoint=files_checkpoint) as log_metrics,
        run.progress("train", num_steps, "step") as advance,
    ):
        show = show_steps(advance)

        def on_step(step: int, row: Mapping[str, float] | None) -> None:
            show(step, row)
            if row is not None:
                log_metrics(step, {f"{prefix}/{n}": row[n] for n in row if n != "step"})

        yield work, on_step


def show_steps(advance: Advance) -> OnStep:
    """Make a callback that moves a bar to each step and shows the loss."""
    seen = 0

    def on_step(step: int, row: Mapping[str, float] | None) -> None:
        nonlocal seen
        advance(step - seen, **({"loss": f"{row['loss']:.3f}"} if row else {}))
        seen = step

    return on_step
