"""Makes temporary copies of the project, which have no git and their own cache of DVC."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_USERS_RECORDS = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME")
"""Variables that are removed, so that a run in a copy does not write to the user's MLflow."""


def copy_project(folder: Path, *, revision: str | None = None) -> None:
    """Copy a commit, or the working tree if `revision` is None; then pull the tiny base model."""
    folder.mkdir(parents=True)
    names, store = b"", folder / "artifacts"
    pack = ["git", "archive", "--format=tar", str(revision)]
    if revision is None:
        # A new, empty repository lists the files, because a zip download has no .git folder.
        lister, store = folder.with_name(f"{folder.name}.lister"), ROOT / "artifacts"
        subprocess.run(["git", "init", "-q", str(lister)], check=True)
        git = ["git", f"--git-dir={lister}/.git", f"--work-tree={ROOT}"]
        listing = [*git, "ls-files", "-oz", "--exclude-standard", "-x", "/artifacts"]
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout
        pack = ["tar", "-cf", "-", "--null", "-T", "-"]
    packed = subprocess.run(pack, cwd=ROOT, input=names, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-xf", "-"], cwd=folder, input=packed, check=True)
    run_in(folder, "dvc", "config", "--local", "core.no_scm", "true")
    run_in(folder, "dvc", "remote", "modify", "--local", "store", "url", str(store))
    run_in(folder, "dvc", "pull", "pretrain_base")


def run_in(folder: Path, *command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command in a copy; return its stdout, or raise SystemExit if the command fails."""
    kept = {name: value for name, value in os.environ.items() if name not in _USERS_RECORDS}
    cache = str(folder.with_name(f"{folder.name}.site-cache"))
    env = {**kept, "PYTHONPATH": str(folder), "DVC_SITE_CACHE_DIR": cache, **(environment or {})}
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\n{' '.join(command)} failed in {folder}")
    return done.stdout
