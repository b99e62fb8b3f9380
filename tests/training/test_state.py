"""An optimiser and weights survive the file bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from contradiff.training.state import load_training_state, save_training_state


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = model(torch.randn(5, 3, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_no_file_is_no_state(tmp_path: Path):
    assert load_training_state(tmp_path / "state.safetensors") is None


def test_a_restored_training_goes_on_as_if_never_stopped(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    model, optimizer = build()
    for seed in range(3):
        a_step(model, optimizer, seed=seed)
    average = {"0.weight": torch.ones(2)}
    save_training_state(
        path,
        step=3,
        parts={"model": model.state_dict(), "average": average},
        optimizer=optimizer,
        notes={"layout": "1 x 1"},
    )
    a_step(model, optimizer, seed=3)

    other, restored = build()
    state = load_training_state(path)
    assert state is not None
    assert (state.step, state.notes) == (3, {"layout": "1 x 1"})
    assert torch.equal(state.parts["average"]["0.weight"], torch.ones(2))
    other.load_state_dict(state.parts["model"])
    state.restore(restored)
    a_step(other, restored, seed=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_failed_write_leaves_the_earlier_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state.safetensors"
    model, optimizer = build()
    save = {"parts": {"model": model.state_dict()}, "optimizer": optimizer, "notes": {}}
    save_training_state(path, step=1, **save)

    def full(_tensors: object, file: Path, *_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("contradiff.training.state.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_training_state(path, step=2, **save)
    state = load_training_state(path)
    assert state is not None
    assert state.step == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
