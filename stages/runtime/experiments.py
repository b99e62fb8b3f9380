"""One row for each experiment in MLflow, complete even where every stage came from DVC's cache."""

from stages.runtime.run import Run
from stages.runtime.tracking import (
    CHECKPOINT,
    Point,
    Store,
    connect,
    flatten,
    flatten_params,
    train_run_of_checkpoint,
)

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contradiff.files import sha256_of

EXPERIMENT = "contradiff"


def upsert_row(
    run: Run,
    *,
    params: Mapping[str, Any],
    metrics: Sequence[Path],
    curve: Path,
    artifacts: Sequence[Path],
) -> str:
    """Write the experiment's row, or add DVC's name of the experiment to the row that is there.

    The same parameters and results are the same row. A row that an interrupted process left
    incomplete is replaced.

    Args:
        run: of the stage.
        params: the whole parameter file; `runtime` in it is left out.
        metrics: files of nested JSON.
        curve: CSV with a `step` column; its other columns become metrics `pretrain.<column>`.
        artifacts: files and folders to keep a copy of.

    Returns:
        The row's run id.

    Raises:
        ValueError: MLflow's store cannot be used.
    """
    store = connect(run.root)
    hashes = {str(path): sha256_of(path) for path in (*metrics, CHECKPOINT)}
    content = {"params": flatten_params(params), "files": hashes}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    points = [*_scores(metrics), *_curve_points(curve)]
    try:
        with store.locked():
            run_id = _find_row(store, key=key)
            if run_id is None:
                tags = {"contradiff.key": key}
                run_id = store.create_run(EXPERIMENT, run=run, params=params, **tags)
                store.log(run_id, points=points)
            _finish_row(store, run_id, artifacts=artifacts)
    except (ValueError, OSError):
        raise
    except Exception as error:  # each kind of store has its own errors
        raise ValueError(
            f"MLflow's store {store.uri}: the results could not be recorded: {error}"
        ) from error
    return run_id


def _scores(metrics: Sequence[Path]) -> Iterator[Point]:
    """Yield all numbers of the metric files, under their dotted keys."""
    for path in metrics:
        for key, value in flatten(json.loads(path.read_text(encoding="utf-8"))):
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield key, float(value), 0


def _curve_points(curve: Path) -> Iterator[Point]:
    """Yield the columns of the training curve, step by step, without empty cells."""
    with curve.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name != "step" and text and math.isfinite(value := float(text)):
                    yield f"pretrain.{name}", value, int(float(row["step"]))


def _find_row(store: Store, *, key: str) -> str | None:
    """Return the finished row's run id; delete unfinished ones."""
    experiment_id = store.experiment_id(EXPERIMENT)
    run_id = None
    for found in store.client.search_runs([experiment_id], f"tags.`contradiff.key` = '{key}'"):
        if found.info.status == "FINISHED":
            run_id = found.info.run_id
        else:
            store.client.delete_run(found.info.run_id)
    return run_id


def _finish_row(store: Store, run_id: str, *, artifacts: Sequence[Path]) -> None:
    client = store.client
    if name := os.environ.get("DVC_EXP_NAME"):
        names = client.get_run(run_id).data.tags.get("dvc.exp_names", "").split()
        client.set_tag(run_id, "dvc.exp_names", " ".join(sorted({*names, name})))
    if train_run := train_run_of_checkpoint(store):
        client.set_tag(run_id, "train_run_id", train_run)
        client.set_tag(train_run, "mlflow.parentRunId", run_id)
    for path in artifacts:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), artifact_path=path.name)
        elif path.is_file():
            client.log_artifact(run_id, str(path))
    client.set_terminated(run_id)
