"""Tests of the training loop and the saved state: resuming, reports, and divergence."""

import doctest
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from contradiff import signals
from contradiff.signals import STOPPING, Stopped
from contradiff.training import loop
from contradiff.training.loop import train
from contradiff.training.state import SavedState
from tests.settings import DAMAGES


class Killed(BaseException):
    """Simulates SIGTERM: no `except Exception` catches it."""


def build(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def run(
    model: nn.Module,
    file: Path,
    *,
    every: int = 2,
    poison: int = -1,
    on_step: Callable[..., None] = lambda *_: None,
    **changes: Any,
) -> list[dict[str, float]]:
    """Train on noise with AdamW and a running mean of one tensor; return the saved curve."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    tensors = model.state_dict() | {"mean": torch.zeros(4)}
    saved = SavedState(file, tensors, every=every)

    def take_gradients(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(5, 3, generator=generator)).square().mean()
        (loss * (math.nan if step == poison else 1.0)).backward()
        return {"loss": loss}

    def keep(done: int, row: Mapping[str, float] | None) -> None:
        if row is not None:
            saved.curve.append(dict(row))
        on_step(done, row)

    settings: dict[str, Any] = {
        "steps": range(saved.resume(optimizer), 9),
        "optimizer": optimizer,
        "lr": lambda step: 0.1 / (step + 1),
        "lr_key": "some.lr",
        "is_reported": lambda done: done % 3 == 0,
        "on_step": keep,
        "clipped": model.parameters(),
        "max_grad_norm": 0.5,
        "update_average": lambda done: tensors["mean"].lerp_(model[0].bias.detach(), 1 / done),
        "saved": saved,
    }
    train(take_gradients, **(settings | changes))
    return saved.curve


@pytest.mark.parametrize("killed_at", [1, 2, 5, 8])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, killed_at: int):
    """Weights, statistics, average, moments and curve agree; no step is lost or repeated."""

    def kill(done: int, _: object) -> None:
        if done == killed_at:
            raise Killed

    whole, cut = build(), build()
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(Killed):
        run(cut, tmp_path / "cut", on_step=kill)
    resumed = build(seed=0 if killed_at <= 2 else 7)
    steps: list[int] = []
    assert run(resumed, tmp_path / "cut", on_step=lambda done, _: steps.append(done)) == expected
    assert steps == list(range((killed_at - 1) // 2 * 2 + 1, 10))
    last, others = (load_file(tmp_path / name) for name in ("whole", "cut"))
    torch.testing.assert_close(others, last, rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]):
    file = tmp_path / "state"
    run(build(), file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{file}: damaged \(.*; delete this file to train from"):
        run(build(), file)


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("stopped_at", [1, 4, 9])
def test_a_signal_ends_a_training_after_its_step_and_no_step_is_lost(
    tmp_path: Path, stopped_at: int, number: signal.Signals
):
    """The signal comes in the middle of a step. Saved states are far apart."""

    def stop(step: int) -> float:
        if step + 1 == stopped_at:
            signal.raise_signal(number)
        return 0.1 / (step + 1)

    expected = run(build(), tmp_path / "whole", every=100)
    cut, handlers = tmp_path / "cut", [signal.getsignal(each) for each in STOPPING]
    with pytest.raises(Stopped, match=f"^saved at step {stopped_at}; run the same command to go"):
        run(build(), cut, every=100, lr=stop)
    assert [signal.getsignal(each) for each in STOPPING] == handlers
    steps: list[int] = []
    resumed = run(build(seed=7), cut, every=100, on_step=lambda done, _: steps.append(done))
    assert steps == list(range(stopped_at + 1, 10))
    assert [row for row in resumed if row["step"] % 3 == 0] == expected


def test_a_second_signal_ends_a_training_at_once_unless_it_is_the_same_signal_sent_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(_: int) -> float:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return 0.1

    with pytest.raises(Stopped, match=r"^saved at step 1;"):
        run(build(), tmp_path / "once", lr=stop)
    monkeypatch.setattr(signals, "SECONDS_OF_ONE_SIGNAL", -1.0)
    with pytest.raises(Stopped, match=r"^interrupted; run the same command"):
        run(build(), tmp_path / "twice", lr=stop)
    assert not (tmp_path / "twice").exists()


def test_values_are_reported_where_asked_at_the_end_and_where_the_state_is_saved(tmp_path: Path):
    heard: list[tuple[int, bool]] = []
    hear = lambda done, row: heard.append((done, row is not None))  # noqa: E731
    curve = run(build(), tmp_path / "f", every=4, on_step=hear)
    assert heard == [(n, n in (3, 4, 6, 8, 9)) for n in range(1, 10)]
    assert [row["step"] for row in curve] == [3, 4, 6, 8, 9]
    assert all(row.keys() == {"step", "lr", "loss", "grad_norm"} for row in curve)
    assert [row["lr"] for row in curve] == pytest.approx([0.1 / n for n in (3, 4, 6, 8, 9)])


@pytest.mark.parametrize("every", [1, 3])
def test_a_training_that_diverged_is_never_saved(tmp_path: Path, every: int):
    """This also holds between two reported steps, and if only the gradient is not finite."""
    expected = r"^some\.lr: the training diverged \(grad_norm is nan at step 3\); lower this rate$"
    with pytest.raises(ValueError, match=expected):
        run(build(), tmp_path / "f", every=every, poison=2, is_reported=lambda _: False)
    model = build()
    saved = SavedState(tmp_path / "f", model.state_dict() | {"mean": torch.zeros(4)}, every=1)
    assert saved.resume(torch.optim.AdamW(model.parameters())) == (2 if every == 1 else 0)


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(loop) == doctest.TestResults(failed=0, attempted=4)
