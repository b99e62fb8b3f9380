"""bench: flops against the parts that a step is made of; the others run and print their table."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import flops, loading, probe, sampling, shards
from contradiff.config import parse, read_params
from contradiff.method.model import ContraDiff
from contradiff.method.unet import encode_to_bottleneck
from contradiff.training import pretraining as training
from contradiff.training.pretraining import set_up

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize(
    ("block", "decode_batch_size", "checkpointing"),
    [("mid", 0, "none"), ("mid", 4, "none"), ("mid+up.1", 4, "all")],
)
def test_peak_is_what_torch_allocates_in_a_real_step(
    tiny_base: Path,
    build_tiny: Callable[..., ContraDiff],
    tmp_path: Path,
    *,
    block: str,
    decode_batch_size: int,
    checkpointing: str,
):
    """By the CPU allocator's own account, which also sees what a kernel works in."""
    content = flops.changed(
        read_params(ROOT / "presets/tiny.yaml"),
        {
            "head.block": block,
            "pretrain.decode_batch_size": decode_batch_size,
            "pretrain.gradient_checkpointing": checkpointing,
        },
    )
    params = parse(flops.Params, content, source="tiny")
    model = build_tiny(**{k: content[k] for k in ("lora", "conditioner", "head")})
    set_up(model, loss=params.loss, gradient_checkpointing=checkpointing, precision="fp32")
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch = flops.empty_batch(model, params, tiny_base, num_images=16)
        batch.timesteps.zero_()
        batch.dropped.zero_()
        flops.training_step(model, params)(batch)["loss"].backward()
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    allocated = list(accumulate(event["args"]["Bytes"] for event in events))
    peak = flops._peak(params, tiny_base, num_images=16)
    assert peak - weights == pytest.approx(max(allocated), rel=0.01)


def test_half_precision_keeps_one_copy_of_the_frozen_weights(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without the cast: float32 and autocast's copies, four bytes a weight more."""
    monkeypatch.setattr(flops, "BATCH_SIZES", (4, 8))
    content = flops.changed(read_params(ROOT / "presets/tiny.yaml"), {"pretrain.precision": "bf16"})
    params = parse(flops.Params, content, source="tiny")
    cast = [m for m in flops.build(params, tiny_base).unet.modules() if is_frozen_matrix(m)]
    num_cast = sum(p.numel() for m in cast for p in m.parameters(recurse=False))
    other = flops.peak_bytes(params, tiny_base)[1]
    monkeypatch.setattr(training, "cast_frozen_weights", lambda _: None)
    difference = flops.peak_bytes(params, tiny_base)[1] - other
    assert 3.5 * num_cast <= difference <= 4 * num_cast


def is_frozen_matrix(module: nn.Module) -> bool:
    kinds = nn.Linear | nn.Conv2d
    return isinstance(module, kinds) and not module.weight.requires_grad


@pytest.mark.parametrize(
    ("checkpointing", "decode_batch_size", "factor"), [("none", 0, 1.1), ("all", 4, 1.0)]
)
def test_norms_are_counted_as_cuda_takes_them(
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    checkpointing: str,
    decode_batch_size: int,
    factor: float,
):
    """In float32 under autocast, which the CPU's autocast leaves as they come."""
    half = torch.ones(2, 4, 3, 3, dtype=torch.bfloat16)
    norm, layer_norm = nn.GroupNorm(2, 4), nn.LayerNorm(3)
    with torch.autocast("cpu", torch.bfloat16):
        with flops.cuda_norms():
            assert norm(half).dtype == layer_norm(half).dtype == torch.float32
            assert nn.Conv2d(4, 4, 1)(norm(half)).dtype == torch.bfloat16
        assert norm(half).dtype == layer_norm(half).dtype == torch.bfloat16
    changes = {
        "pretrain.precision": "bf16",
        "pretrain.decode_batch_size": decode_batch_size,
        "pretrain.gradient_checkpointing": checkpointing,
    }
    content = flops.changed(read_params(ROOT / "presets/tiny.yaml"), changes)
    params = parse(flops.Params, content, source="tiny")
    on_cuda = flops._peak(params, tiny_base, num_images=8)
    monkeypatch.setattr(flops, "cuda_norms", nullcontext)
    on_cpu = flops._peak(params, tiny_base, num_images=8)
    assert on_cuda > factor * on_cpu


def test_switches_cost_what_they_add(count: Any):
    step, features = count()
    assert count(loss__min_snr_gamma=5.0) == (step, features)
    without = count(loss__lambda=0.0)
    assert without[0] < step / 2
    assert without[1] == features
    twice, thrice = count(loss__recon_passes=2)[0], count(loss__recon_passes=3)[0]
    assert thrice - twice == pytest.approx(twice - step)
    first, every = (count(pretrain__gradient_checkpointing=k)[0] for k in ("down.0", "all"))
    assert every > 1.2 * step
    assert step < first < every
    assert count(features__noising="ddim_chain")[1] > 5 * features


def test_shards_are_measured_each_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    for name, value in (("NUM_IMAGES", 20), ("NUM_ROUNDS", 1), ("SAMPLES_PER_SHARD", 8)):
        monkeypatch.setattr(shards, name, value)
    shards.make_images(tmp_path / "train", side=32)
    shards.main([str(tmp_path), "15"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}: 15 images")
    rows = [line for line in lines if line.startswith(("write: ", "read: "))]
    assert len(rows) == 9
    assert [row.split()[-1] for row in rows if "webdataset's" in row] == ["1.00x"]


def test_probe_bench_measures_probes_of_equal_accuracy(capsys: pytest.CaptureFixture[str]):
    probe.main(["600", "16", "3"])
    rows = capsys.readouterr().out.splitlines()[3:]
    assert len(rows) == 4
    accuracies = [float(row.split()[-1].rstrip("%")) for row in rows]
    assert min(accuracies) > 60
    assert max(accuracies) - min(accuracies) < 6


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
