"""The whole pipeline on presets/smoke.yaml, twice, in a throw-away copy: does everything run?

The second run must repeat nothing but `prepare` and `track`, which always run. Takes two to four
minutes; `make smoke` calls it.
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench._copies import copy_working_tree, run_in

ALWAYS = {"prepare", "track"}


def main(_arguments: Sequence[str]) -> None:
    """Run; a failure is printed and ends with exit code 1."""
    with tempfile.TemporaryDirectory() as top:
        project = Path(top) / "project"
        copy_working_tree(project)
        shutil.copyfile(project / "presets/smoke.yaml", project / "params.yaml")
        run_in(project, "dvc", "pull", "pretrain_base")
        print(run_in(project, "dvc", "repro"))
        again = run_in(project, "dvc", "repro")
        ran = set(
            re.findall(r"^(?:Running stage|Stage) '(\w+)'(?:$|:| is cached)", again, re.MULTILINE)
        )
        if ran != ALWAYS:
            raise SystemExit(
                f"{again}\nsmoke: nothing had changed, so {sorted(ALWAYS)} should have run again; "
                f"{sorted(ran)} did"
            )
        print("smoke: passed")
