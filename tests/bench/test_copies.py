"""Throw-away copies of the project, and the two programs that run in them."""

import subprocess
import sys
from math import nan
from pathlib import Path

import pytest

from bench import _copies, same, smoke

REPRO = """\
Running stage 'prepare':
> python -m stages.prepare
'models/tiny' didn't change, skipping
Stage 'shard' didn't change, skipping
Stage 'pretrain_base' is frozen. If there are any changes in dependencies, run it by hand
"""
NUMBERS: same.Numbers = {"losses": {"loss at step 1": 0.5}, "metrics": {"score.fid": 10.0}}


def test_a_tree_has_edits_and_no_ignored_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, ignored = tmp_path / "root", {".gitignore": "/build/\n"}
    committed = ignored | {"code.py": "old", "gone.py": "old", "artifacts/blob": "store"}
    for name, text in (committed | {"build/out": "ignored"}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "code.py").write_text("edited")
    (root / "new.py").write_text("untracked")
    (root / "gone.py").unlink()
    monkeypatch.setattr(_copies, "ROOT", root)
    monkeypatch.setattr(_copies, "run_in", lambda *_: "")

    def copied(name: str, revision: str | None = None) -> dict[str, str]:
        folder = tmp_path / name
        _copies.copy_project(folder, revision=revision)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_text() for path in files}

    assert copied("head", "HEAD") == committed
    edits = ignored | {"code.py": "edited", "new.py": "untracked"}
    assert copied("tree") == edits
    (root / ".git").rename(tmp_path / "no-git")  # a zip download
    assert copied("zip") == edits


def test_a_copy_runs_apart_from_the_users_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://users.own")
    code = "import os; print(os.environ.get('MLFLOW_TRACKING_URI'), os.environ['PYTHONPATH'])"
    assert _copies.run_in(tmp_path, sys.executable, "-c", code) == f"None {tmp_path}\n"
    with pytest.raises(SystemExit, match=r"(?s)said before.*failed in"):
        _copies.run_in(tmp_path, "sh", "-c", "echo said before; exit 3")


@pytest.mark.parametrize(
    ("loss", "fid", "num_different"),
    [(0.5, 10.0009, 0), (0.5, 10.002, 1), (0.5 + 2**-53, 10.0, 1), (nan, nan, 2)],
)
def test_losses_are_equal_to_the_bit_metrics_nearly(loss: float, fid: float, num_different: int):
    other: same.Numbers = {"losses": {"loss at step 1": loss}, "metrics": {"score.fid": fid}}
    for pair in ((NUMBERS, other), (other, NUMBERS)):
        assert sum(differs for _, differs in same.comparison(*pair)) == num_different
    fewer: same.Numbers = {"losses": other["losses"], "metrics": {}}
    assert list(same.comparison(NUMBERS, fewer))[1][1], "a number of one side differs"


def test_leaves_are_the_numbers():
    content = {"probe": {"top1": 0.5, "interval": [0.4, 0.6], "split": "val", "biased": True}}
    expected = {"probe.top1": 0.5, "probe.interval[0]": 0.4, "probe.interval[1]": 0.6}
    assert dict(same.leaves(content)) == expected


def test_second_run_may_only_repeat_what_always_runs():
    smoke.check_second_run(REPRO + "Running stage 'track':\n> python -m stages.track\n")
    for more in ("", "Running stage 'track':\nStage 'shard' is cached - skipping run, checking"):
        with pytest.raises(SystemExit, match="nothing had changed"):
            smoke.check_second_run(REPRO + more)
