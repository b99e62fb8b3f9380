"""bench.flops: its counts against the parts that a step is made of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import flops, sampling
from contradiff.config import parse, read_params
from contradiff.features import encode_to_bottleneck

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def count(tiny_base: Path):
    """GFLOPs an image of the training step and of h on `tiny_base`, with dotted keys changed."""
    content = read_params(ROOT / "presets/tiny.yaml")

    def run(**changes: Any) -> tuple[float, float]:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        params = parse(flops.Params, flops.changed(content, dotted), source="tiny")
        return flops.of_training_step(params, tiny_base), flops.of_features(params, tiny_base)

    return run


def test_features_are_three_half_passes_a_condition_and_the_head(count: Any, tiny_base: Path):
    params = parse(flops.Params, read_params(ROOT / "presets/tiny.yaml"), source="tiny")
    model = flops.build(params, tiny_base)
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        tokens = model.conditioner(torch.empty(1, 3, 32, 32))
        encode_to_bottleneck(
            model.unet,
            torch.empty(3, 4, 8, 8),
            torch.empty(3, dtype=torch.long),
            tokens.expand(3, -1, -1),
        )
        model.attention(torch.empty(1, 3, 32, 2, 2))
    assert count()[1] == pytest.approx(counter.get_total_flops() / 1e9)


def test_switches_cost_what_they_add(count: Any):
    step, features = count()
    assert count(loss__min_snr_gamma=5.0) == (step, features)
    without = count(loss__lambda=0.0)
    assert without[0] < step / 2
    assert without[1] == features
    twice, thrice = count(loss__recon_passes=2)[0], count(loss__recon_passes=3)[0]
    assert thrice - twice == pytest.approx(twice - step)
    assert count(pretrain__gradient_checkpointing=True)[0] > 1.2 * step
    assert count(features__noising="ddim_chain")[1] > 5 * features


@pytest.mark.slow
def test_sampling_compares_equal_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All but the labelled solver make the first's images."""
    monkeypatch.chdir(ROOT)
    with torch.random.fork_rng(devices=[]):
        rows = sampling.measure(sampling.write_base(tmp_path), images=2, steps=5, rounds=1)
    assert [difference for _, _, difference in rows[:3]] in (
        ["", f"{a} of 255 away", f"{b} of 255 away"] for a in (0, 1) for b in (0, 1)
    )
    assert [ratio > 0 for _, ratio, _ in rows] == [True] * 4
    assert "other work" in rows[3][0]
