"""bench.flops: FLOPs beside those of the method's parts, memory beside a real step's."""

import json
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import flops
from contradiff.config import parse, read_params
from contradiff.method.lora import merge_lora
from contradiff.method.model import build_model
from contradiff.method.unet import SplitUNet
from contradiff.training import pretraining
from contradiff.training.pretraining import set_up

CONTENT = read_params(Path(__file__).parents[2] / "presets/tiny.yaml")
# Each operation of a count costs time, whatever its size: LoRA is on one layer of each kind only.
CONTENT["lora"]["targets"] = ["attn1.to_q", "attn2.to_k", "ff.net.2", "time_emb_proj"]
CONTENT["conditioner"]["depth"] = 1
CONTENT["head"] |= {"width": 32, "projector_width": 32}  # most of the work is the UNet's


@pytest.fixture(scope="module")
def small_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_base`, but its UNet has two levels: 8x8x4 latents, 4x4x32 bottleneck."""
    folder = tmp_path_factory.mktemp("small_base")
    for part in ("vae", "scheduler"):
        (folder / part).symlink_to(tiny_base / part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    unet.save_pretrained(folder / "unet")
    return folder


def preset(changes: dict[str, Any]) -> flops.Params:
    return parse(flops.Params, flops.changed(CONTENT, changes), source="tiny")


def test_features_cost_three_half_passes_a_condition_and_the_head(small_base: Path):
    model = flops.build(preset({}), small_base)
    merge_lora(model.unet)
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        tokens = model.conditioner(torch.empty(1, 3, 32, 32)).expand(3, -1, -1)
        timesteps = torch.empty(3, dtype=torch.long)
        SplitUNet(model.unet).down(torch.empty(3, 4, 8, 8), timesteps, tokens)
        model.attention(torch.empty(1, 3, 32, 4, 4))
    expected = counter.get_total_flops() / 1e9
    assert flops.of_features(preset({}), small_base) == pytest.approx(expected)


def test_switches_cost_what_they_add(small_base: Path):
    def step(**changes: Any) -> float:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return flops.of_training_step(preset(dotted), small_base)

    once = step()
    assert step(loss__min_snr_gamma=5.0) == once
    assert step(loss__lambda=0.0) < once / 2
    twice, thrice = (step(loss__recon_passes=number) for number in (2, 3))
    assert thrice - twice == pytest.approx(twice - once)
    first, every = (step(pretrain__gradient_checkpointing=blocks) for blocks in ("down.0", "all"))
    assert once < first < every
    assert every > 1.2 * once
    assert CONTENT["conditioner"]["cond_view"] == "noise"
    one, three = (step(conditioner__cond_view=view) for view in ("same", "noise_both"))
    assert one < once < three  # once: two conditions
    chain = flops.of_features(preset({"features.noising": "ddim_chain"}), small_base)
    assert chain > 5 * flops.of_features(preset({}), small_base)


@pytest.mark.parametrize(
    "values",
    [
        ("mid", 0, "none"),
        pytest.param(("mid", 4, "none"), marks=pytest.mark.slow),
        ("mid+up.1", 4, "all"),
    ],
)
def test_peak_is_what_torch_allocates_in_a_real_step(
    small_base: Path, tmp_path: Path, values: tuple[str, int, str]
):
    """The CPU allocator also counts the working memory of kernels: one percent at most."""
    keys = "head.block", "pretrain.decode_batch_size", "pretrain.gradient_checkpointing"
    changes = dict(zip(keys, values, strict=True))
    params = preset(changes)
    model = build_model(small_base, params, image_size=32, seed=0)
    set_up(model, loss=params.loss, gradient_checkpointing=values[2], precision="fp32")
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch = flops.empty_batch(model, params, small_base, num_images=16)
        batch.timesteps.zero_()
        batch.dropped.zero_()
        flops.training_step(model, params)(batch)["loss"].backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in trace if e["name"] == "[memory]"), key=lambda event: event["ts"])
    allocated = max(accumulate(event["args"]["Bytes"] for event in events))
    peak = flops._peak(params, small_base, num_images=16)
    assert peak - weights == pytest.approx(allocated, rel=0.01)


def test_bf16_keeps_one_copy_of_frozen_weights(small_base: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the cast to bf16, autocast adds copies to float32 weights: four bytes a weight."""
    monkeypatch.setattr(flops, "BATCH_SIZES", (4, 8))
    params = preset({"pretrain.precision": "bf16"})
    modules = flops.build(params, small_base).unet.modules()
    layers = [layer for layer in modules if isinstance(layer, nn.Linear | nn.Conv2d)]
    frozen = [layer for layer in layers if not layer.weight.requires_grad]
    num_cast = sum(p.numel() for layer in frozen for p in layer.parameters(recurse=False))
    other = flops.peak_bytes(params, small_base)[1]
    monkeypatch.setattr(pretraining, "cast_frozen_weights", lambda _: None)
    difference = flops.peak_bytes(params, small_base)[1] - other
    assert 3.5 * num_cast <= difference <= 4 * num_cast


def cast_all_but_norms(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            module.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("blocks", "size", "factor"),
    [("none", 0, 1.1), pytest.param("all", 4, 1.0, marks=pytest.mark.slow)],
)
def test_norms_under_autocast_are_counted_as_cuda_takes_them(
    small_base: Path, monkeypatch: pytest.MonkeyPatch, *, blocks: str, size: int, factor: float
):
    """In float32, in a block that is computed again, too."""
    changes = {"precision": "bf16", "gradient_checkpointing": blocks, "decode_batch_size": size}
    params = preset({f"pretrain.{key}": value for key, value in changes.items()})
    monkeypatch.setattr(pretraining, "cast_frozen_weights", cast_all_but_norms)
    on_cuda = flops._peak(params, small_base, num_images=8)
    monkeypatch.setattr(flops, "cuda_norms", nullcontext)
    assert on_cuda > factor * flops._peak(params, small_base, num_images=8)
