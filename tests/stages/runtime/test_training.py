"""What a training shows, logs and leaves while it runs."""

from stages.runtime import run as run_module
from stages.runtime.run import Run, RuntimeParams
from stages.runtime.training import profiled_steps, show_steps

import gzip
import json
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch

from contradiff.watch import Watch


def run_at(root: Path, **changes: object) -> Run:
    options = {"device": "cpu", "num_workers": 0, "log_every": 1, "checkpoint_every": 1}
    return Run("pretrain", root, RuntimeParams.model_validate(options | changes))


def test_a_logged_line_has_losses_speed_time_left_memory_mfu_and_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Steps 1 and 2 take two seconds each: the clock is read before and after each batch."""
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stderr", StringIO())
    seconds = iter([0, 0, 1, 1, 2, 3])
    watch = Watch(
        num_steps=92, batch_size=8, device=None, ceiling=16.0, clock=lambda: next(seconds)
    )
    monkeypatch.setattr(watch, "_peak_memory", lambda: 1_250_000_000)
    row = {"step": 2.0, "epoch": 0.1, "lr": 1e-3, "grad_norm": 1.0}
    row |= {"loss": 0.375, "reconstruction": 0.125, "contrastive": 2.5}
    logged = []
    with show_steps(run_at(tmp_path), "train", watch, lambda *given: logged.append(given)) as show:
        batches = watch.waiting("ab")
        next(batches)
        show(1, None)
        next(batches)
        show(2, row)
    *_, line = sys.stderr.getvalue().splitlines()
    assert line.startswith("pretrain: train:   2%|")
    assert line.endswith(
        "| 2/92 [00:00, loss=0.375, reconstruction=0.125, contrastive=2.500, left=03:00, "
        "images/s=4.0, memory=1.2GB, MFU=25%, waiting=50%]"
    )
    measured = {"memory_gb": 1.25, "images_per_s": 4.0, "eta_s": 180.0, "mfu": 0.25, "waiting": 0.5}
    assert logged == [(2, row, measured)]


@pytest.mark.parametrize(("wanted", "rank"), [(True, "0"), (False, "0"), (True, "1")])
def test_the_profile_of_ten_steps_is_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, wanted: bool, rank: str
):
    monkeypatch.setenv("RANK", rank)
    with profiled_steps(run_at(tmp_path, profile=wanted), "key") as count_step:
        for step in range(1, 15):
            torch.ones(step, step) @ torch.ones(step, step)
            count_step()
    path = tmp_path / ".work/profile/pretrain-key.json.gz"
    assert path.exists() == (wanted and rank == "0")
    if path.exists():
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        names = [event["name"] for event in events if event.get("ph") == "X"]
        assert sum(name.startswith("ProfilerStep#") for name in names) == 10
        assert names.count("aten::matmul") == 10
        assert [file.name for file in path.parent.iterdir()] == [path.name]
