"""The record of experiments, in a real MLflow store."""

from stages.runtime import tracking
from stages.runtime.moved import mend_store
from stages.runtime.run import Run, RuntimeParams
from stages.runtime.times import record_costs
from stages.runtime.tracking import connect, training_run, upsert_row

import json
import logging
import multiprocessing
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import unquote, urlparse

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from contradiff.config import Section
from stages.track import metric_files, table

PARAMS: dict[str, Any] = {"seed": 0, "loss": {"lambda": 1e-05, "contrastive": "ntxent"}}
PARAMS |= {"base": {"revision": None}, "runtime": {"device": "cpu"}}
PARAMS["lora"] = {"targets": ["attn2.to_q", "attn2.to_k"]}
FLAT = {"seed": "0", "loss.lambda": "1e-05", "loss.contrastive": "ntxent"}
FLAT |= {"base.revision": "null", "lora.targets": '["attn2.to_q", "attn2.to_k"]'}
AXES = {"lambda": 1e-05, "seed": 0.0}

Record = Callable[[], str]
Train = Callable[..., None]


def run_of(root: Path, stage: str) -> Run:
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    return Run(stage=stage, root=root, runtime=runtime)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating a database takes seconds: do it once, then copy it."""
    root = tmp_path_factory.mktemp("store")
    connect(root)
    return root / "mlflow.db"


@pytest.fixture
def root(empty_store: Path, tmp_path: Path) -> Path:
    root = tmp_path / "main repository"
    root.mkdir()
    (root / "mlflow.db").write_bytes(empty_store.read_bytes())
    return root


@pytest.fixture
def client(root: Path) -> Any:
    return connect(root).client


@pytest.fixture
def record(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Records a finished pipeline that lies beside the main repository, as in `exp run --temp`."""
    files = {
        "metrics/probe.json": '{"probe": {"top1": 0.5, "head": "linear"}}',
        "metrics/score.json": '{"score": {"fid": 12.5, "is_mean": 3}}',
        "metrics/pretrain.csv": "step,loss,lr\n0,2.0,0.1\n10,1.0,\n",
        "build/pretrain/model.safetensors": "weights",
        "build/report/index.html": "<html>",
        "build/figures/samples.png": "png",
    }
    record_costs(root, "probe", Section(), seconds=7.5)
    for name, text in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_text(text)
    monkeypatch.chdir(tmp_path / "copy")
    return lambda: upsert_row(
        run_of(root, "track"),
        params=PARAMS,
        metrics=[Path("metrics/probe.json"), Path("metrics/score.json")],
        curve=Path("metrics/pretrain.csv"),
        artifacts=[Path("build/figures/samples.png"), Path("build/report")],
        export=lambda folder: shutil.copytree("build/pretrain", folder),
    )


@pytest.fixture
def train(root: Path, tmp_path: Path) -> Train:
    """Logs a training; all of them resume one another."""

    def train(steps: range, *, fails: bool = False) -> None:
        with training_run(run_of(root, "pretrain"), tmp_path, PARAMS, files_checkpoint=True) as log:
            for step in steps:
                log(step, {"loss": 1.0 - step / 8})
            if fails:
                raise KeyboardInterrupt

    return train


def records(client: Any, experiment: str) -> list[Any]:
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def curve(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_table(tmp_path: Path):
    summary = {"rows": [["top-1", "50.0 %"], ["FID", "12.5"]], "report": "build/report/index.html"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert table(tmp_path / "summary.json") == (
        "top-1  50.0 %\nFID    12.5\n\nreport: build/report/index.html"
    )


class TestRow:
    def test_is_complete(
        self, record: Record, root: Path, client: Any, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("DVC_EXP_NAME", "tiled-bard")
        monkeypatch.setenv("DVC_EXP_BASELINE_REV", "abc123")
        run_id = record()
        [row] = records(client, "contradiff")
        assert row.info.run_id == run_id
        assert (row.info.run_name, row.info.status) == ("tiled-bard", "FINISHED")
        assert row.data.params == FLAT
        scores = {"probe.top1": 0.5, "score.fid": 12.5, "score.is_mean": 3.0}
        curve_ends = {"pretrain.loss": 1.0, "pretrain.lr": 0.1}
        costs = {name: row.data.metrics.pop(name) for name in ("seconds/probe", "memory_mb/probe")}
        assert costs["seconds/probe"] == 7.5
        assert costs["memory_mb/probe"] > 100
        assert row.data.metrics == AXES | scores | curve_ends
        assert curve(client, run_id, "pretrain.loss") == [(0, 2.0), (10, 1.0)]
        assert curve(client, run_id, "pretrain.lr") == [(0, 0.1)]
        assert row.data.tags["dvc.exp_names"] == "tiled-bard"
        assert row.data.tags["revision"] == "abc123"
        artifacts = root / "mlruns/contradiff" / run_id / "artifacts"
        kept = sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*.*"))
        assert kept == ["report/index.html", "samples.png"]
        assert row.data.tags.items() >= {"preset": "", "mlflow.source.git.commit": "abc123"}.items()
        assert row.data.tags["changes"] == ""

    def test_shows_its_study_its_preset_and_what_differs_from_it(
        self, record: Record, client: Any, monkeypatch: pytest.MonkeyPatch
    ):
        for place in ("presets", "studies"):
            Path(place).mkdir()
        Path("studies/table8.yaml").touch()
        Path("presets/tiny.yaml").write_text("seed: 0\nloss: {lambda: 0.1, contrastive: ntxent}\n")
        Path("presets/other.yaml").write_text("seed: 1\n")
        monkeypatch.setenv("DVC_EXP_NAME", "table8-lambda1e-05")
        record()
        tags = records(client, "contradiff")[0].data.tags
        assert (tags["study"], tags["preset"]) == ("table8", "tiny")
        targets = 'lora.targets=["attn2.to_q", "attn2.to_k"]'
        assert tags["changes"] == f"loss.lambda=1e-05 base.revision=null {targets}"

    def test_has_the_model_that_was_exported(
        self, record: Record, client: Any, root: Path, monkeypatch: pytest.MonkeyPatch
    ):
        run_id = record()
        [output] = client.get_run(run_id).outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        assert (model.name, str(model.status)) == ("contradiff", "READY")
        assert {each.key: each.value for each in model.metrics} == {
            "probe.top1": 0.5,
            "score.fid": 12.5,
        }
        assert model.params == FLAT
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        folder = download_artifacts(f"models:/{output.model_id}")
        assert Path(folder, "model.safetensors").read_text() == "weights"
        assert record() == run_id  # again: no second model
        assert len(client.get_run(run_id).outputs.model_outputs) == 1

    def test_the_saved_view_shows_numbers_that_it_has(self, record: Record, client: Any):
        """MLflow's page ignores a column that no run has, and says that a chart has no data."""
        record()
        experiment = client.get_experiment_by_name("contradiff")
        view = json.loads(experiment.tags["mlflow.sharedViewState.scores"])
        [row] = records(client, "contradiff")
        for chart in view["compareRunCharts"][:1]:
            assert {chart["xaxis"]["key"], chart["yaxis"]["key"]} <= row.data.metrics.keys()
        assert "metrics.`lambda`" in view["selectedColumns"]
        assert len(experiment.tags["mlflow.sharedViewState.scores"]) < 5000  # MLflow's limit

    def test_same_results_are_one_row_with_both_names_and_other_results_another(
        self, record: Record, client: Any, monkeypatch: pytest.MonkeyPatch
    ):
        ids: set[str] = set()
        for name in ("ruddy-duck", "azure-cove", "ruddy-duck"):
            monkeypatch.setenv("DVC_EXP_NAME", name)
            ids.add(record())
        [row] = records(client, "contradiff")
        assert ids == {row.info.run_id}
        assert row.data.tags["dvc.exp_names"] == "azure-cove ruddy-duck"
        assert curve(client, row.info.run_id, "pretrain.loss") == [(0, 2.0), (10, 1.0)]
        Path("metrics/probe.json").write_text('{"probe": {"top1": 0.6}}')
        record()
        rows = records(client, "contradiff")
        assert sorted(row.data.metrics["probe.top1"] for row in rows) == [0.5, 0.6]

    def test_half_written_row_is_replaced(
        self, record: Record, client: Any, monkeypatch: pytest.MonkeyPatch
    ):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_outputs", lambda *_: 1 / 0)
            with pytest.raises(ValueError, match="could not be recorded"):
                record()
        run_id = record()
        [row] = records(client, "contradiff")
        assert (row.info.run_id, row.data.params) == (run_id, FLAT)
        [model] = client.search_logged_models([row.info.experiment_id])
        assert model.source_run_id == run_id

    def test_results_of_a_half_finished_member_are_refused(self, record: Record, client: Any):
        Path("metrics/score.json").unlink()
        with pytest.raises(ValueError, match=r"score\.json: no such file; run `dvc repro score`"):
            record()
        assert records(client, "contradiff") == []

    def test_no_row_begins_without_room_for_its_files(
        self, record: Record, root: Path, client: Any, monkeypatch: pytest.MonkeyPatch
    ):
        usage = shutil.disk_usage(root)._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ValueError, match=rf"^{root}: 0\.0 kB are to be written, but only "):
            record()
        assert records(client, "contradiff") == []

    def test_training_is_its_child_while_it_is_there(
        self, record: Record, train: Train, client: Any
    ):
        train(range(1))
        run_id = record()
        [training] = records(client, "contradiff-train")
        assert training.data.tags["mlflow.parentRunId"] == run_id
        [row] = records(client, "contradiff")
        assert row.data.tags["train_run_id"] == training.info.run_id
        client.delete_run(training.info.run_id)
        client.delete_run(run_id)
        record()
        assert "train_run_id" not in records(client, "contradiff")[0].data.tags


class TestTraining:
    def test_resumed_training_goes_on_in_its_run(self, train: Train, client: Any):
        with pytest.raises(KeyboardInterrupt):
            train(range(4), fails=True)
        [record] = records(client, "contradiff-train")
        assert record.info.status == "KILLED"
        train(range(2, 6))  # the checkpoint was older than the last logged step
        [record] = records(client, "contradiff-train")
        assert (record.info.status, record.data.params) == ("FINISHED", FLAT)
        assert record.data.metrics == AXES | {"loss": 1.0 - 5 / 8}
        expected = [(step, 1.0 - step / 8) for step in range(6)]
        assert curve(client, record.info.run_id, "loss") == expected

    def test_the_load_of_the_machine_is_recorded(
        self, root: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
        for wanted, isolated in (("", "on"), ("false", "off")):
            (tmp_path / isolated).mkdir()
            monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", wanted)
            run = run_of(root, "pretrain")
            with training_run(run, tmp_path / isolated, PARAMS, files_checkpoint=False):
                for _ in range(100 if wanted == "" else 1):
                    time.sleep(0.01)
        off, on = records(client, "contradiff-train")  # the newest comes first
        name = "system/cpu_utilization_percentage"
        assert name in on.data.metrics
        assert name not in off.data.metrics

    def test_no_run_of_a_killed_process_stays_open(
        self, train: Train, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """The process dies before the run's id is noted. Then its work folder is lost, too."""
        for dies_in, left in (
            ((tracking._TrainingLog, "remember"), ["FINISHED"]),
            ((MlflowClient, "set_terminated"), ["FINISHED", "FINISHED", "KILLED"]),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(*dies_in, Mock(side_effect=KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    train(range(1))
            (tmp_path / "mlflow.json").unlink(missing_ok=True)
            train(range(2))
            (tmp_path / "mlflow.json").unlink()
            found = records(client, "contradiff-train")
            assert sorted(record.info.status for record in found) == left

    def test_store_that_fails_costs_a_warning(
        self, train: Train, client: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
    ):
        write, works = tracking.Store.log, iter([True, True, False, False, True, True])

        def log(*arguments: Any, **given: Any) -> None:
            assert next(works), "a server that is away"
            write(*arguments, **given)

        monkeypatch.setattr(tracking, "_SECONDS_BETWEEN_BATCHES", 0.0)
        monkeypatch.setattr(tracking, "_SECONDS_BEFORE_RETRY", 0.0)
        monkeypatch.setattr(tracking.Store, "log", log)
        train(range(4))  # the first call logs the parameters
        assert "warning: MLflow: 2 values could not be logged yet" in capfd.readouterr().err
        [record] = records(client, "contradiff-train")
        expected = [(step, 1.0 - step / 8) for step in range(4)]
        assert curve(client, record.info.run_id, "loss") == expected

    @pytest.mark.parametrize(
        ("version", "message"),
        [
            ("451aebb31d03", "by an older version .* copy of the store, then type `mlflow db upgr"),
            ("0123456789ab", "by a newer version .* Install the version that wrote it; or choose"),
        ],
    )
    def test_store_of_another_mlflow_is_refused(
        self, train: Train, root: Path, version: str, message: str
    ):
        with sqlite3.connect(root / "mlflow.db") as database:
            database.execute("UPDATE alembic_version SET version_num = ?", (version,))
        with pytest.raises(ValueError, match=message):
            train(range(0))

    @pytest.mark.parametrize(
        "uri",
        ["sqlite:////proc/none/mlflow.db", "sqlite:///{}/folder", "sqlite:///{}/text", "no://x"],
    )
    def test_wrong_store_is_refused_at_the_start_and_at_once(
        self, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
    ):
        (tmp_path / "folder").mkdir()
        (tmp_path / "text").write_text("This is no database. " * 100)
        uri = uri.format(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setattr("time.sleep", lambda _: pytest.fail("MLflow tries again and again"))
        with pytest.raises(ValueError, match=f"MLflow's store {uri} cannot be used"):
            train(range(0))


class TestPasswords:
    def test_a_store_that_fails_shows_none(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "no://me:hunter2@host/x")
        with pytest.raises(ValueError, match=r"MLflow's store no://\*\*\*@host/x") as caught:
            connect(root)
        assert "hunter2" not in str(caught.value)

    def test_notes_messages_and_params_have_none(
        self, root: Path, client: Any, tmp_path: Path, capfd: Any
    ):
        store = tracking.Store(client, "http://me:hunter2@host", root)
        log = tracking._TrainingLog(store, tmp_path / "note.json", "1")
        log.remember(3)
        assert json.loads((tmp_path / "note.json").read_text())["uri"] == "http://***@host"
        tracking._warn("http://me:hunter2@host does not answer")
        logging.getLogger("mlflow").warning("retry %s", "http://me:hunter2@host")
        assert "hunter2" not in capfd.readouterr().err
        params = {"base": {"path": "http://me:hunter2@host/x"}}
        assert tracking.flatten_params(params) == {"base.path": "http://***@host/x"}


def _train_once(root: Path, number: int) -> None:
    folder = root / f"work-{number}"
    folder.mkdir()
    with training_run(run_of(root, "pretrain"), folder, PARAMS, files_checkpoint=True) as log:
        log(0, {"loss": 1.0})


@pytest.mark.slow
def test_two_processes_may_create_the_store_at_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_train_once, args=(tmp_path, i)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    trainings = records(connect(tmp_path).client, "contradiff-train")
    expected = ["lambda", "loss", "seed"]
    assert [sorted(training.data.metrics) for training in trainings] == [expected, expected]


def test_a_killed_process_leaves_no_half_made_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """MLflow makes its tables in dozens of steps, and cannot go on where it was killed."""
    monkeypatch.setattr("mlflow.store.db.utils._upgrade_db", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        connect(tmp_path)
    assert not list(tmp_path.glob("*mlflow.db*"))


def test_a_deleted_experiment_is_restored(
    root: Path, record: Record, tmp_path: Path, client: Any, capfd: pytest.CaptureFixture[str]
):
    def train_and_record() -> str:
        with training_run(run_of(root, "pretrain"), tmp_path, PARAMS, files_checkpoint=False):
            pass
        return record()

    first = train_and_record()
    for name in (tracking.TRAININGS, tracking.EXPERIMENTS):
        client.delete_experiment(client.get_experiment_by_name(name).experiment_id)
    assert train_and_record() == first
    said = capfd.readouterr().err
    for name in (tracking.TRAININGS, tracking.EXPERIMENTS):
        assert client.get_experiment_by_name(name).lifecycle_stage == "active"
        assert f"the experiment {name} was deleted; it is restored" in said


def test_files_of_a_moved_project_open(
    root: Path, record: Record, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_id = record()
    [output] = client.get_run(run_id).outputs.model_outputs
    root.rename(tmp_path / "moved there")
    monkeypatch.chdir(tmp_path / "moved there")
    there = connect(Path()).client
    assert [file.path for file in there.list_artifacts(run_id)] == ["report", "samples.png"]
    assert Path(there.download_artifacts(run_id, "samples.png", str(tmp_path))).read_text() == "png"
    model = there.get_logged_model(output.model_id).artifact_location
    assert Path(unquote(urlparse(model).path), "model.safetensors").read_text() == "weights"
    assert mend_store(Path()) == 0


def test_every_metric_file_of_the_pipeline_is_recorded():
    folder = Path(__file__).resolve().parents[3]
    files = {path.name for path in metric_files(folder / "dvc.yaml")}
    assert files >= {"probe.json", "score.json", "transfer.json", "separability.json"}
    assert "pretrain.csv" not in files
