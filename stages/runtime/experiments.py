"""One row for each experiment in MLflow, complete even where every stage came from DVC's cache."""

from stages.runtime import tracking
from stages.runtime.run import Run

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contradiff.files import sha256_of

EXPERIMENT = "contradiff"


def upsert_row(
    run: Run, *, params: dict[str, Any], metrics: list[Path], curve: Path, artifacts: list[Path]
) -> str:
    """Write the experiment's row, or add DVC's name to the row that is there; return its run id.

    The same parameters (without `runtime`) and results are the same row. A row that an interrupted
    process left incomplete is replaced. `metrics` are files of nested JSON; each column of the CSV
    file `curve` but `step` becomes a metric `pretrain.<column>`; copies of `artifacts` are kept.

    Raises:
        ValueError: MLflow's store cannot be used.
    """
    store = tracking.connect(run.root)
    client = store.client
    hashes = {str(path): sha256_of(path) for path in (*metrics, tracking.CHECKPOINT)}
    content = {"params": tracking.flatten_params(params), "files": hashes}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    points = list(_points(metrics, curve))
    try:
        with store.locked():
            run_id = None
            places = [store.experiment_id(EXPERIMENT)]
            for found in client.search_runs(places, f"tags.`contradiff.key` = '{key}'"):
                if found.info.status == "FINISHED":
                    run_id = found.info.run_id
                else:
                    client.delete_run(found.info.run_id)
            if run_id is None:
                tags = {"contradiff.key": key}
                run_id = store.create_run(EXPERIMENT, run=run, params=params, **tags)
                store.log(run_id, points=points)
            if name := os.environ.get("DVC_EXP_NAME"):
                names = client.get_run(run_id).data.tags.get("dvc.exp_names", "").split()
                client.set_tag(run_id, "dvc.exp_names", " ".join(sorted({*names, name})))
            if training := tracking.read_note(tracking.note_of_checkpoint(store.root), store):
                client.set_tag(run_id, "train_run_id", training["run_id"])
                client.set_tag(training["run_id"], "mlflow.parentRunId", run_id)
            for path in artifacts:
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), artifact_path=path.name)
                elif path.is_file():
                    client.log_artifact(run_id, str(path))
            client.set_terminated(run_id)
    except Exception as error:  # each kind of store has its own errors
        raise ValueError(
            f"MLflow's store {store.uri}: the results could not be recorded: {error}"
        ) from error
    return run_id


def _points(metrics: list[Path], curve: Path) -> Iterator[tracking.Point]:
    """Yield all numbers of the metric files, and those of the training curve step by step."""
    for path in metrics:
        for key, value in tracking.flatten(json.loads(path.read_text(encoding="utf-8"))):
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield key, float(value), 0
    with curve.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name != "step" and text and math.isfinite(value := float(text)):
                    yield f"pretrain.{name}", value, int(float(row["step"]))
