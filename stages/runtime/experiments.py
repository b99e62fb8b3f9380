"""One row an experiment in MLflow, complete even where every stage came from DVC's cache."""

from stages.runtime.run import Run
from stages.runtime.tracking import (
    Point,
    Store,
    connect,
    flatten,
    flatten_params,
    run_name,
    source_tags,
    train_run_of,
)

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contradiff.files import sha256_of

EXPERIMENT = "contradiff"


@dataclass(frozen=True)
class Results:
    """What one experiment gave.

    Attributes:
        params: the whole parameter file; `runtime` in it is passed over.
        metrics: files of nested JSON, by name.
        curve: CSV with a `step` column; its other columns become metrics `pretrain.<column>`.
        checkpoint: the trained weights.
        artifacts: files and folders to keep a copy of.
    """

    params: Mapping[str, object]
    metrics: Sequence[Path]
    curve: Path
    checkpoint: Path
    artifacts: Sequence[Path]

    def key(self) -> str:
        """Name the experiment by its parameters and results: the same again is the same row."""
        content = {
            "params": flatten_params(self.params),
            "files": {str(path): sha256_of(path) for path in (*self.metrics, self.checkpoint)},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def scores(self) -> list[Point]:
        """Return all finite numbers of the metric files, under their dotted keys."""
        contents: list[dict[str, object]] = [
            json.loads(path.read_text(encoding="utf-8")) for path in self.metrics
        ]
        return [
            (key, float(value), 0)
            for content in contents
            for key, value in flatten(content)
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]

    def curve_points(self) -> list[Point]:
        """Return the columns of the training curve, step by step; empty cells are no points."""
        with self.curve.open(encoding="utf-8", newline="") as file:
            return list(_points(csv.DictReader(file)))


def _points(rows: Iterable[Mapping[str, str]]) -> Iterator[Point]:
    for row in rows:
        for name, text in row.items():
            if name != "step" and text and math.isfinite(value := float(text)):
                yield f"pretrain.{name}", value, int(float(row["step"]))


def upsert_row(results: Results, *, run: Run) -> str:
    """Write the experiment's row in `contradiff`, or add this run's name to the row that is there.

    A row that an interrupted process left incomplete is replaced. Returns the row's run id.

    Raises:
        ValueError: MLflow's store cannot be used.
    """
    store = connect(run.root)
    try:
        with store.locked():
            return _upsert_row(results, run=run, store=store)
    except (ValueError, OSError):
        raise
    except Exception as error:  # each kind of store has its own errors
        raise ValueError(
            f"MLflow's store {store.uri}: the results could not be recorded: {error}"
        ) from error


def _upsert_row(results: Results, *, run: Run, store: Store) -> str:
    client, key = store.client, results.key()
    experiment_id = store.experiment_id(EXPERIMENT)
    row = None
    for found in client.search_runs([experiment_id], f"tags.`contradiff.key` = '{key}'"):
        if found.info.status == "FINISHED":
            row = found
        else:
            client.delete_run(found.info.run_id)
    if row is None:
        tags = source_tags(run) | {"contradiff.key": key}
        created = client.create_run(experiment_id, tags=tags, run_name=run_name())
        run_id = created.info.run_id
        store.log(
            run_id,
            metrics=[*results.scores(), *results.curve_points()],
            params=flatten_params(results.params),
        )
        names: set[str] = set()
    else:
        run_id = row.info.run_id
        names = set(row.data.tags.get("dvc.exp_names", "").split())
    if name := os.environ.get("DVC_EXP_NAME"):
        client.set_tag(run_id, "dvc.exp_names", " ".join(sorted(names | {name})))
    if train_run := train_run_of(results.checkpoint, store=store):
        client.set_tag(run_id, "train_run_id", train_run)
        client.set_tag(train_run, "mlflow.parentRunId", run_id)
    for path in results.artifacts:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), artifact_path=path.name)
        elif path.is_file():
            client.log_artifact(run_id, str(path))
    client.set_terminated(run_id)
    return run_id
