"""`contradiff study` shows what exists, and queues what is missing, once."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from contradiff.cli.app import app
from contradiff.studies import collecting, members
from tests.studies.conftest import dvc as dvc  # noqa: PLC0414  # fixtures
from tests.studies.conftest import project as project  # noqa: PLC0414
from tests.studies.project import add_experiment, git, params

QUEUE = "exp run --queue -q -n lambdas-lambda{0}-seed{1} -S loss.lambda={0} -S seed={1}"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small project has parameters of its own, and code that nobody changes."""
    monkeypatch.setattr(collecting, "hashes_of", lambda _root, paths: dict.fromkeys(paths, "code"))
    monkeypatch.setattr(members, "check_members", lambda *_args, **_more: None)


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["study", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def queued(dvc: Path) -> list[str]:
    lines = dvc.read_text().splitlines() if dvc.exists() else []
    return [line for line in lines if line.startswith("exp run")]


def test_the_list_has_the_questions(project: Path):
    assert call().output == "lambdas  Does λ matter?\n"
    (project / "studies/lambdas.yaml").unlink()
    assert "go to the root of the project" in call(code=1).output


def test_only_missing_members_are_queued_once(project: Path, dvc: Path):
    add_experiment(project, "mine", params(loss={"lambda": 0}))
    commit = add_experiment(project, "waiting", params(seed=1))
    reference = "refs/exps/celery/stash"
    git(project, "update-ref", "--create-reflog", "-m", "commit: x:waiting", reference, commit)
    git(project, "update-ref", "-d", f"refs/exps/{_head(project)}/waiting")
    said = call("lambdas").output
    assert "done     loss.lambda=0 seed=0    mine (" in said
    assert "queued   loss.lambda=0.1 seed=1  waiting" in said
    assert queued(dvc) == [QUEUE.format(0.1, 0), QUEUE.format(0, 1)]


def test_a_taken_name_is_not_used_again(project: Path, dvc: Path):
    add_experiment(project, "lambdas-lambda0-seed0", params(), lock={"score/gone": None})
    call("lambdas")
    assert QUEUE.format(0, 0).replace("seed0 ", "seed0-2 ", 1) in queued(dvc)


def test_a_dry_run_queues_nothing(project: Path, dvc: Path):
    add_experiment(project, "mine", params())
    said = call("lambdas", "--dry-run", "-j", "2").output
    assert "0.00 h  dvc exp run --queue -n lambdas-lambda0-seed0 -S loss.lambda=0 -S seed=0" in said
    assert "no run of them was timed" in said
    call("lambdas", "--slurm", "jobs")
    assert len(list((project / "jobs").iterdir())) == 3
    assert queued(dvc) == []


def test_results_of_other_code_are_run_again_if_asked(project: Path, dvc: Path):
    for seed in (0, 1):
        for weight in (0, 0.1):
            content = params(seed=seed, loss={"lambda": weight})
            add_experiment(project, f"e{seed}{weight}", content, code="old")
    assert "4 results come from other code" in call("lambdas").output
    assert queued(dvc) == []
    call("lambdas", "--again")
    assert len(queued(dvc)) == 4


def test_one_thing_at_a_time(project: Path):
    assert "choose one of" in call("lambdas", "--run", "--report", code=2).output
    assert "name a study" in call("--report", code=2).output
    assert project.is_dir()


def _head(project: Path) -> str:
    head = git(project, "rev-parse", "HEAD")
    return f"{head[:2]}/{head[2:]}"
