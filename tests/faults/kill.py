"""Kill every stage at every write, run the same command again, and compare the outs byte for byte.

    python -m tests.faults kill                           all cases: hours
    python -m tests.faults kill --minutes 30              as many cases as fit, of all stages alike
    python -m tests.faults kill --stages pretrain,score   only these stages
    python -m tests.faults kill --project <folder>        keep the finished project in a folder

The kill is a SIGKILL before, in the middle of or after a write: of the stage alone, of DVC alone
(the stage then goes on), or of both. After each case the outs must equal those of an uninterrupted
run, no process may hold a lock, and MLflow must have one finished run.
"""

import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from tests.faults.project import STAGES, Project, log_of, read_options, start

KILLS = (
    *((when, whom) for whom in ("stage", "group") for when in ("before", "middle", "after")),
    ("before", "dvc"),
)
SECONDS = 1800


@dataclass(frozen=True)
class Case:
    """SIGKILL of `whom` at the write `name` of `stage`."""

    stage: str
    name: str
    when: str
    whom: str


def main(arguments: Sequence[str]) -> None:
    """Run the cases, print the matrix, and exit with code 1 if a case failed."""
    options = read_options("kill", __doc__, arguments)
    end = time.monotonic() + 60 * options.minutes
    results: dict[Case, list[str]] = {}
    with tempfile.TemporaryDirectory() as top:
        finished = Project.open((options.project or Path(top) / "finished").absolute())
        cases = list(cases_of(finished, options.stages.split(",")))
        for number, case in enumerate(cases):
            if time.monotonic() > end:
                break
            folder = Path(top) / f"case-{number}"
            results[case] = run_case(finished.copy(folder), case)
            print("; ".join(results[case]) or "ok", case, flush=True)
    print("\n".join(matrix(results, num_cases=len(cases))))
    raise SystemExit(any(results.values()))


def cases_of(finished: Project, stages: Sequence[str]) -> Iterator[Case]:
    """Yield all cases in a fixed random order, in which the stages take turns."""
    by_stage = [
        [Case(stage, name, *kill) for name in finished.writes[stage] for kill in KILLS]
        for stage in stages
    ]
    for cases in by_stage:
        random.Random(0).shuffle(cases)
    return (case for case in chain(*zip_longest(*by_stage)) if case is not None)


def run_case(project: Project, case: Case) -> list[str]:
    """Kill, run the same command again, and return what is wrong then."""
    project.forget(case.stage)
    command = ("dvc", "repro", "--single-item", "--no-run-cache", case.stage)
    noted = project.folder.with_name(f"{project.folder.name}.pid")
    kill = f"{case.stage} {case.name} {case.when} {case.whom}"
    try:
        start(project.folder, *command, FAULTS_KILL=kill, FAULTS_PID=str(noted)).wait(SECONDS)
        if not noted.exists():
            return [f"the write was not reached: {log_of(project.folder).read_text()}"]
        code = start(project.folder, *command).wait(SECONDS)
    except subprocess.TimeoutExpired:
        return [f"a run takes more than {SECONDS} s"]
    wait_for(int(noted.read_text()))
    if code:
        return [f"the second run ended with code {code}: {log_of(project.folder).read_text()}"]
    wrong = [*project.differences(case.stage), *project.held_locks(), *runs_of(project, case)]
    left = [path for top in ("build", "metrics") for path in (project.folder / top).rglob("*.part")]
    return wrong + [f"{path.relative_to(project.folder)}: left" for path in left]


def wait_for(pid: int) -> None:
    """Wait until the process has ended."""
    with suppress(FileNotFoundError):
        while "zombie" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.1)


def runs_of(project: Project, case: Case) -> Iterator[str]:
    """Yield what is wrong with MLflow's runs: one training, or one row, is expected."""
    wanted = {"pretrain": "contradiff-train", "track": "contradiff"}.get(case.stage)
    if wanted is None:
        return
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    statuses = [run.info.status for run in client.search_runs(experiments)]
    if statuses != ["FINISHED"]:
        yield f"MLflow: runs {statuses}"


def matrix(results: dict[Case, list[str]], *, num_cases: int) -> Iterator[str]:
    """Yield the lines of the matrix: a row for each stage, and a column for each kind of kill."""
    yield "good cases / cases that ran"
    yield "| stage | " + " | ".join(f"{whom}, {when}" for when, whom in KILLS) + " |"
    yield "|---" * (1 + len(KILLS)) + "|"
    ran = Counter((case.stage, case.when, case.whom) for case in results)
    good = Counter((c.stage, c.when, c.whom) for c, wrong in results.items() if not wrong)
    for stage in STAGES:
        cells = ((stage, when, whom) for when, whom in KILLS)
        yield (
            f"| {stage} | "
            + " | ".join(f"{good[cell]}/{ran[cell]}" if ran[cell] else "" for cell in cells)
            + " |"
        )
    yield f"{sum(good.values())} of {len(results)} cases are good; there are {num_cases} cases"
    yield from (f"{case}: {'; '.join(wrong)}" for case, wrong in results.items() if wrong)
