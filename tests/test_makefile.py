"""`make install` sets DVC up: where its store is, and who makes commits. Pushes stay out of git."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = """['remote "store"']\n    url = """
STAGE = """
stages:
  s: {cmd: mkdir -p build && cp params.yaml build/out, params: [seed], outs: [build/out]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with this project's settings of make, git and DVC, and nobody's identity."""
    project = tmp_path / "a project"
    for name in ("Makefile", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes((ROOT / name).read_bytes())
    files = {"dvc.yaml": STAGE, "params.yaml": "seed: 0\n", "artifacts/shipped": ""}
    files |= {"requirements.lock": "", "pyproject.toml": "", ".venv/.installed": ""}
    for name, content in files.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    # `make test` sets MAKEFLAGS and others, which would make the inner make say more.
    unwanted = "GIT_AUTHOR", "GIT_COMMITTER", "MAKE", "MFLAGS"
    for name in [name for name in os.environ if name.startswith(unwanted)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(project)
    return project


def call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commit_all() -> None:
    call("git", "init", "-q")
    call("git", "add", "-A")
    call("git", "add", "-f", "artifacts/shipped")
    call("git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "all")


def test_make_install_says_what_git_needs_and_gives_dvc_the_full_path(project: Path):
    local = project / ".dvc/config.local"
    commit_all()
    said = call("make", "install")
    assert "  git config user.name 'Your Name'\n  git config user.email you@example.com\n" in said
    assert local.read_text() == f"{SECTION}{project}/artifacts\n"
    call("git", "config", "user.name", "a")
    call("git", "config", "user.email", "a@b.c")
    local.write_text(f"{SECTION}s3://bucket/mine\n")
    assert call("make", "install") == ""
    assert local.read_text() == f"{SECTION}s3://bucket/mine\n"
    local.unlink()
    call("dvc", "remote", "add", "--force", "store", "s3://bucket/artifacts")
    assert call("make", "install") == ""
    assert not local.exists()


@pytest.mark.slow
def test_a_push_of_results_and_experiments_leaves_git_as_it_was(project: Path, tmp_path: Path):
    """A bare repository receives the experiment, and the store beside the code its files."""
    commit_all()
    call("git", "init", "-q", "--bare", str(tmp_path / "bare"))
    call("git", "remote", "add", "origin", str(tmp_path / "bare"))
    call("git", "config", "user.name", "a")
    call("git", "config", "user.email", "a@b.c")
    call("make", "install")
    call("dvc", "exp", "run", "-n", "mine", "-S", "seed=1")
    call("dvc", "exp", "push", "origin", "mine")
    assert "refs/exps/" in call("git", "-C", str(tmp_path / "bare"), "for-each-ref")
    stored = {path.read_text() for path in (project / "artifacts/files").rglob("*/*/*")}
    assert stored == {"seed: 1\n"}
    assert call("git", "status", "--short", "-uall") == " M params.yaml\n?? dvc.lock\n"


@pytest.mark.usefixtures("project")
def test_make_ui_serves_this_machine_alone():
    assert "mlflow ui --host 127.0.0.1" in call("make", "-n", "ui")
