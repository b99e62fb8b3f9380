"""Put 8 workers of DVC's queue on one store, and 1,000 experiments into DVC and MLflow.

    python -m tests.faults load                       both: about 10 minutes of one core
    python -m tests.faults load --only queue          16 experiments, run by 8 workers at once
    python -m tests.faults load --only many           1,000 experiments: prints seconds
    python -m tests.faults load --project <folder>    keep the finished project in a folder

The queue's experiments only run the stage `track`, so that the 8 workers write rows at once. Each
experiment must have its row in MLflow. With 1,000 experiments, the report, `dvc exp show` and
`mlflow ui` must still answer.
"""

import argparse
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from contradiff.config import read_params
from tests.faults.project import Project, environment, log_of, start

NUM_WORKERS, NUM_QUEUED = 8, 16
NUM_EXPERIMENTS = 1000
SECONDS = 3600.0
STUDY_COMMAND = "from contradiff.cli.app import app; app()"


def main(arguments: Sequence[str]) -> None:
    """Run what was asked for; exit with code 1 if a row is lost or a program does not answer."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults load", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", choices=("queue", "many"))
    parser.add_argument("--project", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as top:
        finished = Project.open((options.project or Path(top) / "finished").absolute())
        if options.only != "many":
            run_queue(with_git(finished.copy(Path(top) / "queue"), only="track"))
        if options.only != "queue":
            fill_and_time(with_git(finished.copy(Path(top) / "many")))


def with_git(project: Project, *, only: str = "") -> Path:
    """Commit the project in a new git repository, with an empty MLflow store.

    With `only`, the other stages are frozen: DVC takes their outs, and does not run them.
    """
    folder = project.folder
    project.forget("track")
    (folder / "dvc.lock").write_bytes(project.lock)
    if only:
        pipeline = read_params(folder / "dvc.yaml")
        for name, stage in pipeline["stages"].items():
            stage["frozen"] = name != only
        YAML().dump(pipeline, folder / "dvc.yaml")
    for command in (
        ("git", "init", "--quiet"),
        ("git", "config", "user.name", "faults"),
        ("git", "config", "user.email", "faults@localhost"),
        ("dvc", "config", "--local", "--unset", "core.no_scm"),
        ("git", "add", "--all"),
        ("git", "commit", "--quiet", "--message", "begin"),
    ):
        call(folder, *command)
    return folder


def call(folder: Path, *command: str) -> str:
    """Run a command in the project; return its output. Raises SystemExit if the command fails."""
    code = start(folder, *command).wait(SECONDS)
    output = log_of(folder).read_text()
    if code:
        raise SystemExit(f"{output}\n{' '.join(command)} failed in {folder}")
    return output


def run_queue(folder: Path) -> None:
    """Let the workers run the experiments; raise SystemExit if a row is missing."""
    splits = ",".join(map(str, range(2, 2 + NUM_QUEUED)))
    call(folder, "dvc", "exp", "run", "--queue", "--set-param", f"score.splits={splits}")
    began = time.perf_counter()
    call(folder, "dvc", "queue", "start", "--jobs", str(NUM_WORKERS))
    while len(found := rows_of(folder)) < NUM_QUEUED:
        if time.perf_counter() - began > SECONDS:
            break
        time.sleep(2)
    seconds = time.perf_counter() - began
    status = call(folder, "dvc", "queue", "status")
    call(folder, "dvc", "queue", "stop", "--kill")
    print(
        f"{NUM_WORKERS} workers of DVC's queue: {len(found)} of {NUM_QUEUED} rows, {seconds:.0f} s"
    )
    if len(found) != NUM_QUEUED:
        raise SystemExit(status)


def rows_of(folder: Path) -> set[str]:
    """Return the values of score.splits in MLflow's finished rows."""
    query = (
        "SELECT p.value FROM params p JOIN runs r USING (run_uuid) JOIN experiments e "
        "USING (experiment_id) WHERE p.key = 'score.splits' AND r.status = 'FINISHED' "
        "AND r.lifecycle_stage = 'active' AND e.name = 'contradiff'"
    )
    with suppress(sqlite3.OperationalError), sqlite3.connect(folder / "mlflow.db") as store:
        return {value for (value,) in store.execute(query)}
    return set()


def fill_and_time(folder: Path) -> None:
    """Add experiments to MLflow and to DVC, and print how long the programs then take."""
    record = fill_mlflow(folder)
    fill_dvc(folder)
    measure = {
        "one more row in MLflow (stage track)": record,
        "stage report": lambda: call(folder, sys.executable, "-m", "stages.report"),
        "dvc exp show, first time": lambda: call(folder, "dvc", "exp", "show", "--csv"),
        "dvc exp show, second time": lambda: call(folder, "dvc", "exp", "show", "--csv"),
        "contradiff study": lambda: call(
            folder, sys.executable, "-c", STUDY_COMMAND, "study", "seeds", "--dry-run"
        ),
        "make experiments": lambda: call(folder, "make", "experiments"),
    }
    print(f"seconds with {NUM_EXPERIMENTS} experiments:")
    for name, work in measure.items():
        print(f"{seconds_of(work):8.1f}  {name}", flush=True)
    time_ui(folder)


def fill_mlflow(folder: Path) -> Callable[[], object]:
    """Record experiments that differ in their seed; return a function that records one more."""
    from stages.runtime.run import PARAMS_FILE, Run, RuntimeParams
    from stages.runtime.tracking import upsert_row

    os.chdir(folder)
    params = read_params(PARAMS_FILE)
    run = Run("track", folder, RuntimeParams(**params["runtime"]))
    curve = Path("metrics/pretrain.csv")

    def record() -> None:
        params["seed"] += 1
        metrics = sorted(Path("metrics").glob("*.json"))
        upsert_row(run, params=params, metrics=metrics, curve=curve, artifacts=[], export=None)

    seconds = [seconds_of(record) for _ in range(NUM_EXPERIMENTS)]
    print(f"{seconds[1]:8.2f}  seconds for the second row in MLflow")
    return record


def fill_dvc(folder: Path) -> None:
    """Add experiments to git, as DVC stores them: commits that no branch contains."""
    base = call(folder, "git", "rev-parse", "HEAD").strip()
    params, score = read_params(folder / "params.yaml"), folder / "metrics/headline.json"
    scores: dict[str, Any] = json.loads(score.read_text())
    commands: list[str] = []
    for number in range(1, NUM_EXPERIMENTS + 1):
        params["seed"], scores["fid"] = number, float(number)
        YAML().dump(params, text := StringIO())
        commands.append(f"commit refs/exps/{base[:2]}/{base[2:]}/load-{number:04d}")
        commands.append(f"committer faults <faults@localhost> {1_700_000_000 + number} +0000")
        commands.append(f"data 0\nfrom {base}")
        for name, content in (("params.yaml", text.getvalue()), (score.name, json.dumps(scores))):
            path = name if name == "params.yaml" else f"metrics/{name}"
            commands.append(f"M 100644 inline {path}\ndata {len(content.encode())}\n{content}")
    stream = "\n".join([*commands, ""]).encode()
    command = ["git", "fast-import", "--quiet"]
    subprocess.run(command, cwd=folder, input=stream, check=True)


def time_ui(folder: Path) -> None:
    """Start MLflow's pages, and print how long the start and a table of 100 rows take."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = ["mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log_of(folder).open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment(folder, **variables), stdout=log, stderr=log
        )
    try:
        print(f"{seconds_of(lambda: answer_of(f'{address}/health')):8.1f}  mlflow ui: start")
        search = f"{address}/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=contradiff"
        experiment = json.loads(answer_of(search))["experiment"]["experiment_id"]
        body = json.dumps({"experiment_ids": [experiment], "max_results": 100}).encode()
        table = f"{address}/ajax-api/2.0/mlflow/runs/search"
        seconds = seconds_of(lambda: answer_of(table, body))
        print(f"{seconds:8.1f}  mlflow ui: the first 100 rows")
    finally:
        server.terminate()
        server.wait(60)


def answer_of(address: str, body: bytes | None = None) -> bytes:
    """Return a server's answer; wait until the server has started."""
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.read()
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.2)


def seconds_of(work: Callable[[], object]) -> float:
    """Return how many seconds `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
