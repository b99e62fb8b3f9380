"""How long commands take before they work, beside the imports that they cannot do without."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench._copies import copy_project, run_in
from bench._turns import Row, compare

TORCH, DIFFUSERS = ("-c", "import torch"), ("-c", "import torch, diffusers, peft")
CLI = "from contradiff.cli.app import app; app()"
ROWS = (
    ("`python -m stages.validate`", ("-m", "stages.validate"), TORCH),
    ("`contradiff --help`", ("-c", CLI, "--help"), TORCH),
    ("import of the stage `pretrain`", ("-c", "import stages.pretrain"), DIFFUSERS),
)


def rows(folder: Path, *, rounds: int) -> Iterator[Row]:
    """Yield the rows. Each run is a new process; its CPU time counts."""
    project, python = folder / "project", sys.executable
    copy_project(project)
    for name, ours, peer in ROWS:
        yield compare(
            f"start-up: {name}",
            f"`{peer[1]}`",
            (partial(run_in, project, python, *ours), partial(run_in, project, python, *peer)),
            rounds=rounds,
            kind="time",
        )
