"""Shows a training's progress on stderr, logs its values in MLflow, and lets it resume."""

from stages.runtime.run import Run
from stages.runtime.tracking import training_run

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from contradiff.config import Section

OnStep = Callable[[int, Mapping[str, float] | None], None]
"""The type of the callback `on_step` of `contradiff.training.loop.train`."""


class Session(TypedDict):
    """Keyword arguments for a function that trains. The arguments do not change the result."""

    work_dir: Path
    num_workers: int
    log_every: int
    checkpoint_every: int
    on_step: OnStep


@contextmanager
def follow_training(
    run: Run,
    params: Section,
    inputs: Sequence[Path],
    data_digest: str,
    state_version: int,
    *,
    num_steps: int,
    files_checkpoint: bool = False,
) -> Generator[Session]:
    """Open a training's work folder, MLflow run and progress bar; yield arguments for the trainer.

    An interrupted training is resumed if `params`, `inputs` and `data_digest` (the hash of the
    training images) are the same. Only pretraining sets `files_checkpoint` (see `training_run`).
    """
    shown, runtime = params.model_dump(mode="json", by_alias=True), run.runtime
    prefix = "train" if files_checkpoint else run.stage
    decisive = {**shown, "train": data_digest}
    with (
        run.work_dir(decisive, inputs, state_version=state_version) as work,
        training_run(run, work, shown, files_checkpoint=files_checkpoint) as log_metrics,
        show_steps(run, "train", num_steps) as show,
    ):

        def on_step(step: int, row: Mapping[str, float] | None) -> None:
            show(step, row)
            if row is not None:
                log_metrics(step, {f"{prefix}/{n}": row[n] for n in row if n != "step"})

        yield Session(
            work_dir=work,
            num_workers=runtime.num_workers,
            log_every=runtime.log_every,
            checkpoint_every=runtime.checkpoint_every,
            on_step=on_step,
        )


@contextmanager
def show_steps(run: Run, description: str, num_steps: int) -> Generator[OnStep]:
    """Show a progress bar; yield a callback that moves the bar to a step and shows the loss."""
    seen = 0
    with run.progress(description, num_steps, "step") as advance:

        def on_step(step: int, row: Mapping[str, float] | None) -> None:
            nonlocal seen
            advance(step - seen, **({"loss": f"{row['loss']:.3f}"} if row else {}))
            seen = step

        yield on_step
