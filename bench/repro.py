"""The whole pipeline of the embedded default, in a clean copy of the last commit.

It takes some minutes of both cores, which should be idle. So it runs only if it is named:
`python -m bench repro`. Installation, `make` and `dvc pull` are not counted.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench._copies import copy_project, run_in
from bench._turns import Row
from contradiff.planning.times import read_notes

GOAL = 7.0
"""Minutes on two cores without AVX-512. Processors that have it are faster, and have no goal."""


def rows(folder: Path, *, rounds: int) -> Iterator[Row]:
    """Yield the row, of a single round whatever `rounds` is."""
    del rounds
    copy_project(folder / "project", revision="HEAD")
    started = time.monotonic()
    # With this variable, which the other rows need, long stages would take one process.
    run_in(folder / "project", "env", "-u", "OMP_NUM_THREADS", "dvc", "repro")
    minutes = (time.monotonic() - started) / 60
    seconds = {note["stage"]: note["seconds"] for note in read_notes(folder / "project")}
    longest = sorted(seconds, key=lambda stage: -seconds[stage])
    stages = ", ".join(f"{stage} {seconds[stage]:.0f}" for stage in longest if seconds[stage] >= 5)
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    yield Row(
        "`dvc repro` of the embedded default",
        peer="",
        kind="minutes",
        goal=None if has_avx512 else GOAL,
        note=f"wall-clock time; the goal of {GOAL:g} is for cores without AVX-512; "
        f"seconds of the longest stages: {stages}; of all stages "
        f"{sum(seconds.values()):.0f}; the rest of {60 * minutes:.0f} is imports and DVC",
        figure=minutes,
        lowest=minutes,
        highest=minutes,
        rounds=1,
    )
