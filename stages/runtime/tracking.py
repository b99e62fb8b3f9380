"""Writes to MLflow: one run with live curves for each training, and one run for each experiment.

An experiment's run is called its row. A row is complete even if DVC took all stages from its cache.
"""

from stages.runtime.labels import (
    AXES,
    SCORES,
    axes,
    flatten_params,
    labels,
    saved_views,
    view_address,
)
from stages.runtime.moved import mend_store
from stages.runtime.passwords import hide_passwords
from stages.runtime.run import Run
from stages.runtime.times import read_costs
from stages.runtime.work_dir import revision

import csv
import hashlib
import json
import logging
import math
import os
import re
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contradiff.config import flatten
from contradiff.files import (
    check_free_space,
    explain_damage,
    hold_lock,
    read_json,
    replace_file,
    sha256_of,
)
from contradiff.imports import slow_import

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

TRAININGS, EXPERIMENTS = "contradiff-train", "contradiff"
"""Two MLflow experiments, which are groups of runs: one of all trainings, one of all rows."""
COSTS = {"seconds", "memory_mb", "gpu_memory_mb"}
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
        # MLflow's page then begins with the table of runs, not with traces of language models.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return self.client.create_experiment(name, artifact_location=location, tags=tags)

    def create_run(self, experiment: str, *, run: Run, params: Any, **tags: str) -> str:
        """Create an MLflow run with parameters, and with tags (see `labels`)."""
        tags |= {"mlflow.source.name": f"stages.{run.stage}", "mlflow.source.type": "LOCAL"}
        tags |= labels(params)
        name = os.environ.get("DVC_EXP_NAME") or revision(short=True) or "workspace"
        created = self.client.create_run(self.experiment_id(experiment), tags=tags, run_name=name)
        points = [(name, value, 0) for name, value in axes(params).items()]
        self.log(created.info.run_id, points=points, params=flatten_params(params))
        return created.info.run_id

    def log_model(self, run_id: str, folder: Path, *, params: Any) -> str:
        """Copy an exported model to MLflow as a logged model of a run; return the model's id."""
        from mlflow.entities import LoggedModelOutput

        model = self.client.create_logged_model(
            self.client.get_run(run_id).info.experiment_id,
            name="contradiff",
            source_run_id=run_id,
            params=flatten_params(params),
            model_type="contradiff",
        )
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return model.model_id

    def models_of(self, run_id: str) -> list[str]:
        """Return the ids of a run's logged models."""
        place = self.client.get_run(run_id).info.experiment_id
        where = f"source_run_id = '{run_id}'"
        return [model.model_id for model in self.client.search_logged_models([place], where)]

    def finished_row(self, experiment_id: str, key: str) -> str | None:
        """Return the run with the tag `key`; delete those that a killed process left unfinished."""
        row = None
        for found in self.client.search_runs([experiment_id], f"tags.`contradiff.key` = '{key}'"):
            if found.info.status == "FINISHED":
                row = found.info.run_id
                continue
            for model in self.models_of(found.info.run_id):
                self.client.delete_logged_model(model)
            self.client.delete_run(found.info.run_id)
        return row

    def end_killed(self, experiment: str, place: str) -> None:
        """End the runs that killed processes left "running" with the tag `place`.

        A run without values is deleted. Use within `locked`.
        """
        where = f"tags.`contradiff.work` = '{place}' and attributes.status = 'RUNNING'"
        for left in self.client.search_runs([self.experiment_id(experiment)], where):
            if left.data.metrics.keys() - AXES.keys():
                self.client.set_terminated(left.info.run_id, status="KILLED")
            else:
                self.client.delete_run(left.info.run_id)

    def log(
        self,
        run_id: str,
        *,
        points: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        model_id: str | None = None,
    ) -> None:
        """Log all values in one call, because single calls are slow; `points` also of a model."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step, model_id) for name, value, step in points]
        self.client.log_batch(run_id, metrics, [Param(*pair) for pair in (params or {}).items()])


def connect(root: Path) -> Store:
    """Connect to MLFLOW_TRACKING_URI, by default mlflow.db; raise ValueError if this fails."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with slow_import():
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
            mend_store(root)
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # each kind of store raises its own exceptions
        if "out-of-date database schema" in str(error):
            raise ValueError(_explain_version(uri, str(error))) from error
        fault = hide_passwords(f"MLflow's store {uri} cannot be used: {_reason(error)}")
        raise ValueError(
            f"{fault}. Correct the environment variable MLFLOW_TRACKING_URI, or unset the variable "
            f"to use {root}/mlflow.db"
        ) from error
    return Store(client, uri, root)


def _reason(error: Exception) -> str:
    """Return the first line of an error, and what to do. SQLAlchemy adds lines with the SQL."""
    line = str(error).partition("\n")[0]
    return f"{line}; delete some files, then try again" if "disk is full" in line else line


def _check_database(path: Path) -> None:
    """Raise an error if an SQLite database cannot be written. MLflow would try for 100 seconds."""
    with closing(sqlite3.connect(path, timeout=60)) as database:  # another process may write now
        database.execute("BEGIN IMMEDIATE")
        database.rollback()


def _explain_version(uri: str, error: str) -> str:
    """Say what to do with a store whose tables are those of another version of MLflow."""
    import mlflow
    from mlflow.store import db_migrations

    [found] = re.findall(r"found version (\w+)", error) or ["unknown"]
    scripts = Path(db_migrations.__path__[0], "versions")
    if any(scripts.glob(f"{found}_*.py")):
        which = "an older version"
        remedy = f"Make a copy of the store, then type `mlflow db upgrade '{hide_passwords(uri)}'`"
    else:
        which = "a newer version"
        remedy = "Install the version that wrote it"
    return (
        f"MLflow's store {hide_passwords(uri)} was written by {which} than the installed MLflow "
        f"{mlflow.__version__}. {remedy}; or choose another store with the environment variable "
        "MLFLOW_TRACKING_URI, such as sqlite:////full/path/new.db"
    )


def _record_without_passwords(*given: Any, **named: Any) -> logging.LogRecord:
    """Make the record of a log message, such as MLflow's, without passwords in URLs."""
    record = logging.LogRecord(*given, **named)
    record.msg, record.args = hide_passwords(record.getMessage()), ()
    return record


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
            _warn(f"{len(self.waiting)} values could not be logged yet: {_reason(error)}")
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
    twice. MLflow also records the machine's load every 10 seconds (system metrics), unless
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false.

    `files_checkpoint` means that the training writes build/pretrain. `upsert_row` can then
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
        fault = f"MLflow's store {store.shown} cannot be written to: {_reason(error)}"
        raise ValueError(hide_passwords(fault)) from error
    status, monitor = "FAILED", _monitor(store, log.run_id)
    try:
        yield log
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        log.send()
        if monitor is not None:
            monitor.finish()
        try:
            store.client.set_terminated(log.run_id, status=status)
        except Exception as error:  # noqa: BLE001  # logging must not stop a training
            _warn(f"the end of the training could not be logged: {_reason(error)}")
    if files_checkpoint and CHECKPOINT.is_file():
        log.note = _note_of_checkpoint(run.root)
        log.remember(log.last_step)


def _monitor(store: Store, run_id: str) -> "SystemMetricsMonitor | None":
    """Start the thread that records the machine's load; its faults are only warnings."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() in {"false", "0"}:
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=store.uri)
    monitor.start()
    return monitor


def upsert_row(
    run: Run,
    *,
    params: dict[str, Any],
    metrics: list[Path],
    curve: Path,
    artifacts: list[Path],
    export: Callable[[Path], object] | None,
) -> str:
    """Write the experiment's row (its run in MLflow), and return the row's id.

    Experiments with equal parameters (except `runtime`) and equal results share one row. The row
    lists the experiments' names in DVC. An incomplete row of an interrupted process is replaced.
    `metrics` are nested JSON files. Each column of the CSV file `curve`, except `step`, becomes a
    metric `pretrain.<column>`. The files and folders `artifacts` are copied to MLflow.
    `export` writes the trained model to a folder that it is given; a new row gets this folder as a
    logged model.
    """
    store = connect(run.root)
    client = store.client
    points = [*_points(metrics, curve), *_costs(run, params)]
    hashes = {str(path): sha256_of(path) for path in (*metrics, CHECKPOINT)}
    content = {"params": flatten_params(params), "files": hashes}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    if not store.is_server:  # otherwise a full disk would leave a half-written page in MLflow
        files = (file for path in artifacts for file in (path, *path.rglob("*")) if file.is_file())
        check_free_space(store.root, sum(file.stat().st_size for file in files))
    try:
        with store.locked():
            place = store.experiment_id(EXPERIMENTS)
            run_id = store.finished_row(place, key)
            if run_id is None:
                tags = {"contradiff.key": key}
                run_id = store.create_run(EXPERIMENTS, run=run, params=params, **tags)
                model = None
                if export is not None:
                    with tempfile.TemporaryDirectory(dir=store.root / ".work") as folder:
                        export(Path(folder, "model"))
                        model = store.log_model(run_id, Path(folder, "model"), params=params)
                main = [point for point in points if point[0] in SCORES]
                store.log(run_id, points=main, model_id=model)
                store.log(run_id, points=[point for point in points if point not in main])
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
            for name, view in saved_views().items():
                client.set_experiment_tag(place, name, view)
    except Exception as error:  # each kind of store raises its own exceptions
        fault = f"the results could not be recorded: {_reason(error)}"
        raise ValueError(hide_passwords(f"MLflow's store {store.shown}: {fault}")) from error
    pages = store.shown.rstrip("/") if store.is_server else "http://127.0.0.1:5000"
    start = "" if store.is_server else " (type `make ui` first)"
    run.log(f"recorded in MLflow as run {run_id}; all: {pages}/{view_address(place)}{start}")
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


def _costs(run: Run, params: dict[str, Any]) -> Iterator[Point]:
    """Yield the time and memory of each stage before this one, as far as they are known."""
    for stage, record in read_costs(run.root, params).items():
        for name in COSTS & record.keys() if stage != run.stage else ():
            yield f"{name}/{stage}", float(record[name]), 0


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
