"""Run all stages twice in a temporary copy, with presets/smoke.yaml, to see whether they work.

The second run must repeat only the stages `prepare` and `track`, which always run. `make smoke`
calls this program, which takes two to four minutes.
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench._copies import copy_project, run_in

ALWAYS = {"prepare", "track"}


def main(_arguments: Sequence[str]) -> None:
    """Run the pipeline twice. On a failure, print its output and exit with code 1."""
    with tempfile.TemporaryDirectory() as top:
        project = Path(top) / "project"
        copy_project(project)
        shutil.copyfile(project / "presets/smoke.yaml", project / "params.yaml")
        print(run_in(project, "dvc", "repro"))
        check_second_run(run_in(project, "dvc", "repro"))
    print("smoke: passed")


def check_second_run(output: str) -> None:
    """Raise SystemExit if the second `dvc repro` updated stages that are not in `ALWAYS`."""
    ran = set(re.findall(r"(?m)^(?:Running stage|Stage) '(\w+)'(?::?$| is cached)", output))
    if ran != ALWAYS:
        raise SystemExit(
            f"{output}\nsmoke: nothing had changed, so the second run should have repeated "
            f"{sorted(ALWAYS)}; it repeated {sorted(ran)}"
        )
