"""Kill every stage at every kind of write, run it again, and compare the outs byte for byte.

    python -m tests.faults kill                           all cases: about 25 minutes of one core
    python -m tests.faults kill --minutes 5               as many cases as fit, of all stages alike
    python -m tests.faults kill --stages pretrain,score   only these stages
    python -m tests.faults kill --project <folder>        keep the finished project in a folder

The kill is a SIGKILL before, in the middle of or after a write. Numbered files, such as shards, and
repeated writes of one file are one kind: of these, the middle one is killed. The columns:

    stage   the stage is killed under DVC; the next `dvc repro` deletes its outs and runs it
    hand    `python -m stages.X` is killed, and started again with what it has left
    group   DVC and its stage are killed, and DVC is started again
    dvc     DVC alone is killed, and DVC is started again while the stage goes on

After each case the outs must equal those of an uninterrupted run, no process may hold a lock, and
MLflow must have one finished run. Each kind of write is killed at the three times, in turn in the
first two columns, which do what DVC does without DVC. What DVC itself keeps does not depend on the
write, so `group` and `dvc` kill each stage once: another kind, at another time, in each stage.
"""

from stages.runtime.tracking import connect
from stages.runtime.work_dir import NOTE_NAME

import random
import re
import shutil
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, product, zip_longest
from pathlib import Path

from tests.faults.forks import load_libraries, repro, run_fork, run_stage
from tests.faults.hook.sitecustomize import DATABASE
from tests.faults.project import STAGES, Project, log_of, read_options

WHENS = ("before", "middle", "after")
WHOMS = ("stage", "hand", "group", "dvc")
DVC_ALONE = ("dvc", "before")


@dataclass(frozen=True)
class Case:
    """SIGKILL of `whom` at the `number`-th write `name` of `stage`."""

    stage: str
    name: str
    number: int
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
        load_libraries()
        (store := Path(top) / "store").mkdir()
        assert run_fork(store, partial(connect, store)) == 0, log_of(store).read_text()
        began, project = time.monotonic(), None
        for number, case in enumerate(cases):
            if time.monotonic() > end:
                break
            # After a bad case, the project is no longer as it was.
            project = project or finished.copy(Path(top) / f"case-{number}")
            started = time.monotonic()
            results[case] = run_case(project, case, empty_store=store / DATABASE)
            seconds = f"{time.monotonic() - started:.1f} s"
            print("; ".join(results[case]) or "ok", case, seconds, flush=True)
            project = None if results[case] else project
        minutes = (time.monotonic() - began) / 60
    print("\n".join(matrix(results, num_cases=len(cases))))
    print(f"{minutes:.1f} minutes")
    raise SystemExit(any(results.values()))


def cases_of(finished: Project, stages: Sequence[str]) -> Iterator[Case]:
    """Yield all cases in a fixed random order, in which the stages take turns."""
    by_stage: list[list[Case]] = []
    for stage in stages:
        kinds = list(kinds_of(finished.writes[stage]))
        place = STAGES.index(stage)
        times = [(*kind, when) for kind in kinds for when in WHENS]
        # Only under DVC, a work folder is kept and noted as finished: the second of these notes.
        cases = [
            Case(stage, *time, WHOMS[0 if time[0].endswith(NOTE_NAME) else n % 2])
            for n, time in enumerate(times, start=place)
        ]
        cases += [Case(stage, *times[place * 5 % len(times)], "group")]
        cases += [Case(stage, *kinds[-1 - place % len(kinds)], *reversed(DVC_ALONE))]
        random.Random(0).shuffle(cases)
        by_stage.append(cases)
    return (case for case in chain(*zip_longest(*by_stage)) if case is not None)


def kinds_of(writes: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield name and number of one write of each kind: the middle one, its number-th of this name.

    Of transactions, it is the first: how many follow depends on what earlier stages have recorded.
    Tags alone come only after earlier stages; a folder of tempfile has another name next time.
    """
    names: dict[str, list[str]] = {}
    for name in writes:
        if name == f"{DATABASE}:tags" or re.search(r"/tmp\w{8}/", name):
            continue
        names.setdefault(re.sub(r"\d+|train-|val-", "", name), []).append(name)
    for same in names.values():
        middle = 0 if same[0].startswith(f"{DATABASE}:") else len(same) // 2
        yield same[middle], same[: middle + 1].count(same[middle])


def run_case(project: Project, case: Case, *, empty_store: Path) -> list[str]:
    """Kill, run the same command again, and return what is wrong then."""
    project.forget(case.stage)
    if case.name != DATABASE:  # MLflow takes longer to make its tables than a stage to run
        shutil.copyfile(empty_store, project.folder / DATABASE)
    folder, has_dvc = project.folder, case.whom in {"group", "dvc"}
    noted = folder.with_name(f"{folder.name}.pid")
    noted.unlink(missing_ok=True)
    whom = "stage" if case.whom == "hand" else case.whom
    run = partial(run_fork, folder, partial(repro if has_dvc else run_stage, case.stage))
    variables = {"DVC_ROOT": str(folder)} if case.whom == "stage" else {}
    kill = f"{case.stage} {case.name} {case.number} {case.when} {whom}"
    code = run(FAULTS_KILL=kill, FAULTS_PID=str(noted), **variables)
    if code != -signal.SIGKILL or not noted.exists():
        return [f"not killed, but ended with code {code}: {log_of(folder).read_text()[-500:]}"]
    if case.whom == "stage":
        project.delete_outs(case.stage)
    if code := run(**variables):
        return [f"the second run ended with code {code}: {log_of(folder).read_text()[-1500:]}"]
    wait_for(int(noted.read_text()))
    wrong = [*project.differences(case.stage), *project.held_locks(), *runs_of(project, case)]
    left = [path for top in ("build", "metrics") for path in (folder / top).rglob("*.part")]
    return wrong + [f"{path.relative_to(folder)}: left" for path in left]


def wait_for(pid: int) -> None:
    """Wait until the process has ended."""
    with suppress(FileNotFoundError):
        while "zombie" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.1)


def runs_of(project: Project, case: Case) -> Iterator[str]:
    """Yield what is wrong with MLflow's runs: one training, or one row, is expected."""
    if not any(name.startswith("mlflow.db") for name in project.writes[case.stage]):
        return
    query = "SELECT status FROM runs WHERE lifecycle_stage = 'active'"
    with closing(sqlite3.connect(project.folder / "mlflow.db")) as store:
        statuses = [status for (status,) in store.execute(query)]
    if statuses != ["FINISHED"]:
        yield f"MLflow: runs {statuses}"


def matrix(results: dict[Case, list[str]], *, num_cases: int) -> Iterator[str]:
    """Yield the lines of the matrix: a row for each stage, and a column for each kind of kill."""
    columns = [*product(WHOMS[:3], WHENS), DVC_ALONE]
    yield "good cases / cases that ran"
    yield "| stage | " + " | ".join(f"{whom}, {when}" for whom, when in columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    ran = Counter((case.stage, case.whom, case.when) for case in results)
    good = Counter((c.stage, c.whom, c.when) for c, wrong in results.items() if not wrong)
    for stage in STAGES:
        cells = ((stage, *column) for column in columns)
        yield (
            f"| {stage} | "
            + " | ".join(f"{good[cell]}/{ran[cell]}" if ran[cell] else "" for cell in cells)
            + " |"
        )
    yield f"{sum(good.values())} of {len(results)} cases are good; there are {num_cases} cases"
    yield from (f"{case}: {'; '.join(wrong)}" for case, wrong in results.items() if wrong)
