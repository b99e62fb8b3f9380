"""Writes to MLflow: one run with live curves for each training, and one run for each experiment.

An experiment's run is called its row. A row is complete even if DVC took all stages from its cache.
"""

from stages.runtime.passwords import hide_passwords
from stages.runtime.run import Run
from stages.runtime.work_dir import revision

import csv
import hashlib
import json
import logging
import math
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contradiff.files import (
    check_free_space,
    explain_damage,
    hold_lock,
    read_json,
    replace_file,
    sha256_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAININGS, EXPERIMENTS = "contradiff-train", "contradiff"
"""Two MLflow experiments, which are groups of runs: one of all trainings, one of all rows."""
CHECKPOINT = Path("build/pretrain/model.safetensors")

# Defaults that users can override: no telemetry, no warnings about git, and only a short wait if a
# server does not answer.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_SECONDS_BETWEEN_BATCHES = 5.0
_SECONDS_BEFORE_RETRY = 60.0

Point = tuple[str, float, int]
"""Name, value and step of a metric."""


@dataclass(frozen=True)
class Store:
    """A connection to MLflow."""

    client: "MlflowClient"
    uri: str
    root: Path

    @property
    def is_server(self) -> bool:
        """Whether a server keeps the files of runs. Otherwise this project keeps them."""
        return self.uri.startswith(("http", "databricks"))

    @property
    def shown(self) -> str:
        """The store's address without a password."""
        return hide_passwords(self.uri)

    def locked(self) -> AbstractContextManager[None]:
        """Hold a lock, so that two processes of this project do not create the same run."""
        return hold_lock(self.root / ".work/locks/mlflow")

    def experiment_id(self, name: str) -> str:
        """Return the id of an MLflow experiment; create or restore it. Use within `locked`."""
        if experiment := self.client.get_experiment_by_name(name):
            if experiment.lifecycle_stage != "active":  # no run can be written to it
                _warn(f"the experiment {name} was deleted; it is restored with its runs")
                self.client.restore_experiment(experiment.experiment_id)
            return experiment.experiment_id
        # By default, MLflow would keep files in the current folder, perhaps a temporary copy.
        location = None if self.is_server else (self.root / "mlruns" / name).as_uri()
        return self.client.create_experiment(name, artifact_location=location)

    def create_run(self, experiment: str, *, run: Run, params: Any, **tags: str) -> str:
        """Create an MLflow run with parameters, and with tags for the stage and the commit."""
        tags["baseline_rev"] = os.environ.get("DVC_EXP_BASELINE_REV") or revision() or ""
        tags |= {"mlflow.source.name": f"stages.{run.stage}", "mlflow.source.type": "LOCAL"}
        name = os.environ.get("DVC_EXP_NAME") or revision(short=True) or "workspace"
        created = self.client.create_run(self.experiment_id(experiment), tags=tags, run_name=name)
        self.log(created.info.run_id, params=flatten_params(params))
        return created.info.run_id

    def end_killed(self, experiment: str, place: str) -> None:
        """End the runs that killed processes left "running" with the tag `place`.

        A run without values is deleted. Use within `locked`.
        """
        where = f"tags.`contradiff.work` = '{place}' and attributes.status = 'RUNNING'"
        for left in self.client.search_runs([self.experiment_id(experiment)], where):
            if left.data.metrics:
                self.client.set_terminated(left.info.run_id, status="KILLED")
            else:
                self.client.delete_run(left.info.run_id)

    def log(
        self, run_id: str, *, points: Sequence[Point] = (), params: Mapping[str, str] | None = None
    ) -> None:
        """Log all values in one call, because single calls are slow."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in points]
        self.client.log_batch(run_id, metrics, [Param(*pair) for pair in (params or {}).items()])


def connect(root: Path) -> Store:
    """Connect to MLFLOW_TRACKING_URI, by default mlflow.db; raise ValueError if this fails."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # This must come after the import, because the import also sets the levels.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.setLogRecordFactory(_record_without_passwords)

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    try:
        # Without the lock, two processes that create a new database at once would crash.
        with hold_lock(root / ".work/locks/mlflow"):
            if uri.startswith("sqlite:///"):
                path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
                if not path.exists():  # a process that is killed must not leave half of the tables
                    with replace_file(path) as new:
                        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
                _check_database(path)
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # each kind of store raises its own exceptions
        fault = hide_passwords(f"MLflow's store {uri} cannot be used: {error}")
        raise ValueError(
            f"{fault}. Correct the environment variable MLFLOW_TRACKING_URI, or unset the variable "
            f"to use {root}/mlflow.db"
        ) from error
    return Store(client, uri, root)


def _check_database(path: Path) -> None:
    """Raise an error if an SQLite database cannot be written. MLflow would try for 100 seconds."""
    with closing(sqlite3.connect(path, timeout=60)) as database:  # another process may write now
        database.execute("BEGIN IMMEDIATE")
        database.rollback()


def _record_without_passwords(*given: Any, **named: Any) -> logging.LogRecord:
    """Make the record of a log message, such as MLflow's, without passwords in URLs."""
    record = logging.LogRecord(*given, **named)
    record.msg, record.args = hide_passwords(record.getMessage()), ()
    return record


def flatten(content: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value in nested mappings; a list is one value."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flatten_params(content: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters for MLflow: dotted keys and values as text, without section `runtime`."""
    return {
        key: hide_passwords(value if isinstance(value, str) else json.dumps(value))
        for key, value in flatten({key: content[key] for key in content if key != "runtime"})
    }


@dataclass
class _TrainingLog:
    """Collects the values of a training and sends them to MLflow in batches.

    If a batch fails, its values are sent again with the next batch. (MLflow's own queue would
    lose the values.)
    """

    store: Store
    note: Path
    run_id: str
    last_step: int = -1
    waiting: list[Point] = field(default_factory=list[Point])
    next_batch: float = 0.0

    def __call__(self, step: int, values: Mapping[str, float], /) -> None:
        if step <= self.last_step:  # this step was logged before an interruption
            return
        self.waiting += [(name, float(value), step) for name, value in values.items()]
        if time.monotonic() >= self.next_batch:
            self.send()

    def send(self) -> None:
        try:
            self.store.log(self.run_id, points=self.waiting)
        except Exception as error:  # noqa: BLE001  # logging must not stop a long training
            _warn(f"{len(self.waiting)} values could not be logged yet: {error}")
            self.next_batch = time.monotonic() + _SECONDS_BEFORE_RETRY
            return
        if self.waiting:
            self.remember(self.waiting[-1][2])
        self.waiting.clear()
        self.next_batch = time.monotonic() + _SECONDS_BETWEEN_BATCHES

    def remember(self, last_step: int) -> None:
        content = {"run_id": self.run_id, "uri": self.store.shown, "last_step": last_step}
        with replace_file(self.note) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def training_run(
    run: Run, work_dir: Path, params: Mapping[str, Any], *, files_checkpoint: bool
) -> Generator[Callable[[int, Mapping[str, float]], None]]:
    """Open a training's run in MLflow; yield a function that logs the values of a step.

    `work_dir` keeps the run's id, so a resumed training continues the same run and logs no step
    twice. `files_checkpoint` means that the training writes build/pretrain. `upsert_row` can then
    find the training's run, and shows the run under the experiment's row. If MLflow fails at the
    start, this function raises ValueError. Later failures only print warnings.
    """
    if not run.is_main:
        yield lambda _step, _values: None
        return
    store, note = connect(run.root), work_dir / "mlflow.json"
    try:
        if known := _read_note(note, store):
            store.client.update_run(known["run_id"], status="RUNNING")
            log = _TrainingLog(store, note, known["run_id"], known["last_step"])
        else:
            place = hashlib.sha256(f"{socket.gethostname()}:{note.resolve()}".encode()).hexdigest()
            tags = {"world_size": os.environ.get("WORLD_SIZE", "1"), "contradiff.work": place}
            with store.locked():
                store.end_killed(TRAININGS, place)
                run_id = store.create_run(TRAININGS, run=run, params=params, **tags)
            log = _TrainingLog(store, note, run_id)
            log.remember(log.last_step)
    except Exception as error:  # each kind of store raises its own exceptions
        fault = f"MLflow's store {store.shown} cannot be written to: {error}"
        raise ValueError(hide_passwords(fault)) from error
    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        log.send()
        try:
            store.client.set_terminated(log.run_id, status=status)
        except Exception as error:  # noqa: BLE001  # logging must not stop a training
            _warn(f"the end of the training could not be logged: {error}")
    if files_checkpoint and CHECKPOINT.is_file():
        log.note = _note_of_checkpoint(run.root)
        log.remember(log.last_step)


def upsert_row(
    run: Run, *, params: dict[str, Any], metrics: list[Path], curve: Path, artifacts: list[Path]
) -> str:
    """Write the experiment's row (its run in MLflow), and return the row's id.

    Experiments with equal parameters (except `runtime`) and equal results share one row. The row
    lists the experiments' names in DVC. An incomplete row of an interrupted process is replaced.
    `metrics` are nested JSON files. Each column of the CSV file `curve`, except `step`, becomes a
    metric `pretrain.<column>`. The files and folders `artifacts` are copied to MLflow.
    """
    store = connect(run.root)
    client = store.client
    hashes = {str(path): sha256_of(path) for path in (*metrics, CHECKPOINT)}
    content = {"params": flatten_params(params), "files": hashes}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    points = list(_points(metrics, curve))
    if not store.is_server:  # otherwise a full disk would leave a half-written page in MLflow
        files = (file for path in artifacts for file in (path, *path.rglob("*")) if file.is_file())
        check_free_space(store.root, sum(file.stat().st_size for file in files))
    try:
        with store.locked():
            run_id = None
            places = [store.experiment_id(EXPERIMENTS)]
            for found in client.search_runs(places, f"tags.`contradiff.key` = '{key}'"):
                if found.info.status == "FINISHED":
                    run_id = found.info.run_id
                else:
                    client.delete_run(found.info.run_id)
            if run_id is None:
                tags = {"contradiff.key": key}
                run_id = store.create_run(EXPERIMENTS, run=run, params=params, **tags)
                store.log(run_id, points=points)
            if name := os.environ.get("DVC_EXP_NAME"):
                names = client.get_run(run_id).data.tags.get("dvc.exp_names", "").split()
                client.set_tag(run_id, "dvc.exp_names", " ".join(sorted({*names, name})))
            if training := _read_note(_note_of_checkpoint(store.root), store):
                client.set_tag(run_id, "train_run_id", training["run_id"])
                client.set_tag(training["run_id"], "mlflow.parentRunId", run_id)
            for path in artifacts:
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), artifact_path=path.name)
                elif path.is_file():
                    client.log_artifact(run_id, str(path))
            client.set_terminated(run_id)
    except Exception as error:  # each kind of store raises its own exceptions
        fault = f"the results could not be recorded: {error}"
        raise ValueError(hide_passwords(f"MLflow's store {store.shown}: {fault}")) from error
    return run_id


def _points(metrics: list[Path], curve: Path) -> Iterator[Point]:
    """Yield all numbers in the metric files, and the training curve's values at each step."""
    for path in metrics:
        for key, value in flatten(read_json(path, remedy=f"run `dvc repro {path.stem}`")):
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield key, float(value), 0
    with explain_damage(curve, remedy="run `dvc repro pretrain`"):
        rows = list(csv.DictReader(curve.read_text(encoding="utf-8").splitlines()))
        points = [(row.pop("step"), row) for row in rows]
        for step, row in points:
            for name, text in row.items():
                if text and math.isfinite(value := float(text)):
                    yield f"pretrain.{name}", value, int(float(step))


def _read_note(note: Path, store: Store) -> dict[str, Any] | None:
    """Read the file that names a training's run; return None if `store` has no such run."""
    from mlflow.exceptions import MlflowException

    if not note.is_file():
        return None
    known = read_json(note, remedy="delete this file; the training then begins a new run in MLflow")
    try:
        is_here = known["uri"] == store.shown and store.client.get_run(known["run_id"])
    except MlflowException:
        return None
    return known if is_here and is_here.info.lifecycle_stage == "active" else None


def _note_of_checkpoint(root: Path) -> Path:
    """Return the path of the file that names the training run of the current checkpoint."""
    return root / ".work/runs" / f"{sha256_of(CHECKPOINT)}.json"


def _warn(message: str) -> None:
    print(hide_passwords(f"contradiff: warning: MLflow: {message}"), file=sys.stderr)
