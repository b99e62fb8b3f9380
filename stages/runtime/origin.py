"""Says how a run was made: its command, its code, and the machine that it ran on."""

from stages.runtime.labels import flatten_params, nearest_preset
from stages.runtime.work_dir import revision

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_CODE = "stages", "contradiff", "dvc.yaml"
_PACKAGES = "torch", "diffusers", "peft", "scikit-learn", "dvc", "mlflow"


def command_of(params: Mapping[str, Any]) -> str:
    """Return the commands that make a run with these parameters, one on a line.

    They begin from the preset with the fewest other values. Section `runtime` is left out.
    """
    commit = (os.environ.get("DVC_EXP_BASELINE_REV") or revision() or "").removesuffix("-dirty")
    preset, changes = nearest_preset(flatten_params(params))
    options = [f"-S {shlex.quote(f'{key}={value}')}" for key, value in changes.items()]
    lines = [f"git checkout {commit}"] if commit else []
    lines += [f"make preset NAME={preset}"] if preset else []
    return "\n".join([*lines, " ".join(["dvc exp run", *options]) if options else "dvc repro"])


def code_of_run() -> str:
    """Say in a sentence which code ran: the commit, and which files of code differ from it."""
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or revision()
    if commit is None:
        return "The code was not in a git repository, so no commit names it."
    command = ["git", "diff", "--name-only", "HEAD", "--", *_CODE]
    changed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    told = f"The code was that of commit {commit.removesuffix('-dirty')}"
    if not changed:
        return f"{told}."
    more = f" and {len(changed) - 5} more files" if len(changed) > 5 else ""
    return f"{told}, but these files had other content: {', '.join(changed[:5])}{more}."


def describe_machine() -> dict[str, str]:
    """Return the system, the processor and the versions of the main packages."""
    processor, info = platform.processor(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
        names = (value.strip() for key, _, value in lines if key.strip() == "model name")
        processor = next(names, processor)
    found = {"system": platform.platform(), "processor": processor or platform.machine()}
    found |= {"cores": str(os.cpu_count()), "Python": platform.python_version()}
    return found | {name: metadata.version(name) for name in _PACKAGES}
