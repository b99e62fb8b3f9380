"""Throw-away copies of the project, in which the whole pipeline runs without touching the real one.

A copy is a DVC project of its own, without git. It has its own parameters, lock file, cache and
tracking database, and reads the base model from the store of the revision that it is a copy of.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_working_tree(folder: Path) -> None:
    """Copy what git does not ignore, edits included; works in a zip download too, without git."""
    lister = folder.with_name(f"{folder.name}.lister")
    subprocess.run(["git", "init", "-q", str(lister)], check=True)
    listed = subprocess.run(
        [
            *("git", f"--git-dir={lister}/.git", f"--work-tree={ROOT}", "ls-files", "-o", "-z"),
            *("--exclude-standard", "-x", "/artifacts"),
        ],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    folder.mkdir(parents=True)
    _extract(["tar", "-cf", "-", "--null", "-T", "-"], listed.stdout, folder)
    _prepare(folder, store=ROOT / "artifacts")


def copy_revision(revision: str, folder: Path) -> None:
    """Copy a commit as git has it."""
    folder.mkdir(parents=True)
    _extract(["git", "archive", "--format=tar", revision], b"", folder)
    _prepare(folder, store=folder / "artifacts")


def run_in(folder: Path, *command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command in a copy, by the copy's own code; returns what it prints on stdout.

    Raises:
        SystemExit: the command failed; its output is printed.
    """
    own = {
        **{name: value for name, value in os.environ.items() if name not in _LIVE},
        "PYTHONPATH": str(folder),
        "DVC_SITE_CACHE_DIR": str(folder.with_name(f"{folder.name}.site-cache")),
        **(environment or {}),
    }
    done = subprocess.run(command, cwd=folder, env=own, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\n{' '.join(command)} failed in {folder}")
    return done.stdout


_LIVE = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME")
"""Variables by which a run would write to the user's own records."""


def _extract(command: list[str], names: bytes, folder: Path) -> None:
    packed = subprocess.run(command, cwd=ROOT, input=names, capture_output=True, check=True)
    subprocess.run(["tar", "-xf", "-"], cwd=folder, input=packed.stdout, check=True)


def _prepare(folder: Path, *, store: Path) -> None:
    run_in(folder, "dvc", "config", "--local", "core.no_scm", "true")
    run_in(folder, "dvc", "remote", "modify", "--local", "store", "url", str(store))
