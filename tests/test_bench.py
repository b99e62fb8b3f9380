"""bench.flops: its counts against the parts that a step is made of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import flops, loading
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


def test_loaders_have_the_same_work(tmp_path: Path):
    """Every image once, whoever loads it, also in workers that end with the epoch."""
    num_bytes = loading.write_files(tmp_path, 100, size=128)
    assert num_bytes == sum(path.stat().st_size for path in tmp_path.glob("tree/*/*.jpg"))
    for build in (loading.image_folder, loading.minimal_webdataset):
        batches = list(build(tmp_path, 128, 0))
        assert [batch[0].shape for batch in batches] == [(50, 3, 128, 128)] * 2
    for num_workers in (0, 2):
        batches = list(loading.ours(tmp_path, "pixels", num_workers))
        assert [batch["conditions"].shape for batch in batches] == [(2, 50, 3, 128, 128)] * 2
        assert len({row.numpy().tobytes() for b in batches for row in b["moments"][0]}) == 100
