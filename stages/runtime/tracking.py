"""The connection to MLflow, and the live record of a training.

Two MLflow experiments: `contradiff-train` holds the live curves of trainings, `contradiff` has one
row for each experiment, which `_experiments` writes at its end. No other module knows MLflow.
"""

from stages.runtime.work_dir import revision

import json
import logging
import os
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from pydantic import BaseModel

from contradiff.files import hold_lock, replace_file, sha256_of

if TYPE_CHECKING:
    from stages.runtime.run import Run

    from mlflow import MlflowClient

TRAIN_EXPERIMENT = "contradiff-train"
CHECKPOINT = Path("build/pretrain/model.safetensors")

# For users who have not chosen otherwise: nothing phones home, no hints and no warnings about git,
# and a server that is away costs a training seconds and not minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_SECONDS_BETWEEN_BATCHES = 5.0
_SECONDS_BEFORE_RETRY = 60.0
_MAX_WAITING_METRICS = 100_000
# MLflow's own limits of one request
_METRICS_PER_BATCH = 500
_PARAMS_PER_BATCH = 100

Point = tuple[str, float, int]
"""Name, value and step of a metric."""

T = TypeVar("T")


class LogMetrics(Protocol):
    """Log values of one training step."""

    def __call__(self, step: int, values: Mapping[str, float], /) -> None:
        """Log."""
        ...


@dataclass(frozen=True)
class Store:
    """A connection to MLflow."""

    client: "MlflowClient"
    uri: str
    root: Path

    @contextmanager
    def locked(self) -> Generator[None]:
        """Let one process of this project at a time create or change shared records."""
        with hold_lock(self.root / ".work" / "locks" / "mlflow"):
            yield

    def experiment_id(self, name: str) -> str:
        """Return the id of an experiment, created at its first use; call it under `locked`."""
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        # By default artifacts lie where the creator happens to run, perhaps a temporary copy. A
        # server has its own place for them.
        is_server = self.uri.startswith(("http", "databricks"))
        location = None if is_server else (self.root / "mlruns" / name).as_uri()
        return self.client.create_experiment(name, artifact_location=location)

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Log in batches: one by one, 500 values take 15 s instead of 1."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        for batch in _chunks(list((params or {}).items()), _PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=[Param(*pair) for pair in batch])
        for batch in _chunks(metrics, _METRICS_PER_BATCH):
            self.client.log_batch(
                run_id, metrics=[Metric(name, value, now, step) for name, value, step in batch]
            )


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def connect(root: Path) -> Store:
    """Open the store that MLFLOW_TRACKING_URI names, or else mlflow.db in the project's folder.

    Raises:
        ValueError: the store cannot be used.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # after the import, which sets the levels itself
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    try:
        # processes that create the same new database at once would crash
        with hold_lock(root / ".work" / "locks" / "mlflow"):
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # each kind of store has its own errors
        raise ValueError(
            f"MLflow's store {uri} cannot be used; see to the variable MLFLOW_TRACKING_URI "
            f"(unset: mlflow.db in {root}): {error}"
        ) from error
    return Store(client=client, uri=uri, root=root)


def flatten(content: Mapping[str, object], *, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the leaves of nested mappings as (dotted key, value); a list is a leaf."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, prefix=f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{prefix}{name}", value


def flatten_params(content: Mapping[str, object]) -> dict[str, str]:
    """Return parameters as MLflow keeps them: dotted keys, values as text, without `runtime`."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in flatten({key: content[key] for key in content if key != "runtime"})
    }


def run_name() -> str:
    """Return DVC's name of the experiment, or else git's short revision, or `workspace`."""
    return os.environ.get("DVC_EXP_NAME") or revision(short=True) or "workspace"


def source_tags(run: "Run") -> dict[str, str]:
    """Return tags that say from what code a record comes."""
    baseline = os.environ.get("DVC_EXP_BASELINE_REV") or revision() or ""
    return {
        "baseline_rev": baseline,
        "mlflow.source.name": f"stages.{run.stage}",
        "mlflow.source.type": "LOCAL",
    }


@contextmanager
def training_run(
    run: "Run",
    *,
    work_dir: Path,
    params: Mapping[str, object] | BaseModel,
    files_checkpoint: bool,
) -> Generator[LogMetrics]:
    """Yield a function that logs metrics live; see `Run.training_run`.

    The run id is kept in `work_dir`, so that a resumed training goes on in the same MLflow run;
    steps that it repeats are not logged twice. After success of the training that makes the
    checkpoint, the id is filed under its hash, where `train_run_of` finds it.
    """
    if not run.is_main:
        yield _log_nothing
        return
    if isinstance(params, BaseModel):
        params = params.model_dump(mode="json", by_alias=True)
    store = connect(run.root)
    log = _TrainingLog.begin(store, run=run, work_dir=work_dir, params=flatten_params(params))
    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        log.end(status)
    if files_checkpoint:
        run.on_success.append(lambda: _file_train_run(run.root, run_id=log.run_id, uri=store.uri))


def _log_nothing(_step: int, _values: Mapping[str, float], /) -> None:
    pass


@dataclass
class _TrainingLog:
    """Collects points and sends them in batches; a store that fails is warned of and retried."""

    store: Store
    run_id: str
    note: Path
    last_step: int
    waiting: list[Point] = field(default_factory=list[Point])
    next_batch: float = 0.0

    @classmethod
    def begin(
        cls, store: Store, *, run: "Run", work_dir: Path, params: Mapping[str, str]
    ) -> "_TrainingLog":
        note = work_dir / "mlflow.json"
        try:
            if note.is_file():
                known = json.loads(note.read_text(encoding="utf-8"))
                if known["uri"] == store.uri and _is_active(store, known["run_id"]):
                    store.client.update_run(known["run_id"], status="RUNNING")
                    return cls(store, known["run_id"], note, last_step=known["last_step"])
            with store.locked():
                experiment_id = store.experiment_id(TRAIN_EXPERIMENT)
            tags = source_tags(run) | {"world_size": os.environ.get("WORLD_SIZE", "1")}
            created = store.client.create_run(experiment_id, tags=tags, run_name=run_name())
            store.log(created.info.run_id, params=params)
        except Exception as error:  # each kind of store has its own errors
            raise ValueError(f"MLflow's store {store.uri} cannot be written to: {error}") from error
        log = cls(store, created.info.run_id, note, last_step=-1)
        log.remember(log.last_step)
        return log

    def __call__(self, step: int, values: Mapping[str, float], /) -> None:
        if step <= self.last_step:
            return
        self.waiting.extend((name, float(value), step) for name, value in values.items())
        if time.monotonic() >= self.next_batch:
            self.send()

    def send(self) -> None:
        if not self.waiting:
            return
        try:
            self.store.log(self.run_id, metrics=self.waiting)
        except Exception as error:  # noqa: BLE001  # a training of a day must survive its record
            _warn(f"MLflow: {len(self.waiting)} values wait to be logged: {error}")
            del self.waiting[:-_MAX_WAITING_METRICS]
            self.next_batch = time.monotonic() + _SECONDS_BEFORE_RETRY
            return
        self.remember(self.waiting[-1][2])
        self.waiting.clear()
        self.next_batch = time.monotonic() + _SECONDS_BETWEEN_BATCHES

    def remember(self, last_step: int) -> None:
        content = {"run_id": self.run_id, "uri": self.store.uri, "last_step": last_step}
        with replace_file(self.note) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

    def end(self, status: str) -> None:
        self.send()
        try:
            self.store.client.set_terminated(self.run_id, status=status)
        except Exception as error:  # noqa: BLE001  # as above
            _warn(f"MLflow: the training's end could not be logged: {error}")


def _is_active(store: Store, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


def _warn(message: str) -> None:
    print(f"contradiff: warning: {message}", file=sys.stderr)


def _train_run_file(root: Path, checkpoint: Path) -> Path:
    return root / ".work" / "runs" / f"{sha256_of(checkpoint)}.json"


def _file_train_run(root: Path, *, run_id: str, uri: str) -> None:
    if CHECKPOINT.is_file():
        with replace_file(_train_run_file(root, CHECKPOINT)) as temporary:
            temporary.write_text(json.dumps({"run_id": run_id, "uri": uri}), encoding="utf-8")


def train_run_of(checkpoint: Path, *, store: Store) -> str | None:
    """Return the id of the training that wrote `checkpoint`; None if it was not on this machine."""
    path = _train_run_file(store.root, checkpoint)
    if not path.is_file():
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    is_here = known["uri"] == store.uri and _is_active(store, known["run_id"])
    return known["run_id"] if is_here else None
