"""A plan names what a run costs, what does not fit, and the parameter that makes it fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from contradiff.cli.app import app
from contradiff.config import PRESETS, parse, read_params
from contradiff.planning.costs import GPUS, STEP_GFLOP, UNET, Measured, peak_bf16
from contradiff.planning.plan import ImageCounts, Machine, Plan, plan, step_memory_gb
from contradiff.rules import AllParams


def params_of(name: str, changes: dict[str, Any] | None = None) -> AllParams:
    content = read_params(PRESETS / f"{name}.yaml")
    for key, value in (changes or {}).items():
        section, field = key.split(".")
        content[section][field] = value
    return parse(AllParams, content, source=name)


def plan_of(name: str, machine: Machine, **changes: Any) -> Plan:
    params = params_of(name, {key.replace("__", "."): value for key, value in changes.items()})
    return plan(params, machine, ImageCounts.assumed(params), num_workers=8)


FOUR, ONE = Machine(4, GPUS["h100"]), Machine(1, GPUS["rtx3090"])


@pytest.mark.parametrize(
    ("blocks", "num_gpus", "counted"),
    [("none", 4, 70.0), ("down.0", 4, 48.7), ("all", 4, 32.3), ("none", 8, 38.3)],
)
def test_memory_of_a_step_is_what_bench_counts(blocks: str, num_gpus: int, counted: float):
    """docs/imagenet.md has the counts; on top come the optimiser, and the card's own needs."""
    params = params_of("paper", {"pretrain.gradient_checkpointing": blocks})
    assert step_memory_gb(params, num_gpus=num_gpus) == pytest.approx(counted + 2.3, abs=0.1)


@pytest.mark.parametrize(
    ("name", "machine", "hours"), [("paper", FOUR, 72), ("single-gpu", ONE, 24)]
)
def test_the_preset_fits_its_machine(name: str, machine: Machine, hours: float):
    found = plan_of(name, machine)
    assert found.misfits == ()
    assert 1 < found.hours < hours
    assert max(cost.memory_gb or 0 for cost in found.stages) < machine.gpu.memory_gb
    assert "Everything fits." in str(found)


@pytest.mark.parametrize(
    ("changes", "memory", "remedy"),
    [
        (
            {"pretrain__gradient_checkpointing": "none"},
            60.0,
            "pretrain.gradient_checkpointing to down.0",
        ),
        ({"pretrain__decode_batch_size": 0}, 60.0, "pretrain.decode_batch_size to 32"),
        ({}, 24.0, "pretrain.batch_size to 256"),
        ({"generate__batch_size": 1000}, 80.0, "generate.batch_size to "),
        ({"latents__batch_size": 1000}, 80.0, "latents.batch_size to "),
    ],
)
def test_what_does_not_fit_names_the_parameter_that_makes_it_fit(
    changes: dict[str, Any], memory: float, remedy: str
):
    machine = replace(FOUR, gpu=replace(FOUR.gpu, memory_gb=memory))
    found = [line for line in plan_of("paper", machine, **changes).misfits if remedy in line]
    assert len(found) == 1
    # The remedy is true: with the value that it names, the stage fits.
    stage = found[0].split()[0]
    named = dict(
        part.split(" to ")
        for part in found[0].partition("; set ")[2].partition(" (")[0].split(", ")
    )
    values = {k.replace(".", "__"): _value(v.removesuffix(" or less")) for k, v in named.items()}
    again = plan_of("paper", machine, **(changes | values)).misfits
    assert not [line for line in again if line.startswith(f"{stage} ")]


def _value(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def test_costs_follow_the_work():
    def hours(stage: str, machine: Machine = FOUR, **changes: Any) -> float:
        stages = plan_of("paper", machine, **changes).stages
        return next(cost.time.hours for cost in stages if cost.stage == stage)

    assert hours("pretrain", replace(FOUR, num_gpus=8)) == pytest.approx(hours("pretrain") / 2)
    assert hours("pretrain", pretrain__epochs=50) == pytest.approx(hours("pretrain") / 2)
    stated = replace(FOUR, gpu=replace(FOUR.gpu, measured={}))
    whole = hours("generate", stated)
    assert hours("generate", stated, generate__precision="bf16") < whole / 5
    assert plan_of("paper", FOUR, conditioner__input="latents").stages[3].time.bound == "GPU"
    few = plan(params := params_of("paper"), FOUR, ImageCounts.assumed(params), num_workers=1)
    assert few.stages[3].time.bound == "reading"


def test_each_hour_names_its_rate_and_a_measured_one_replaces_a_stated_one():
    stated = plan_of("paper", replace(FOUR, gpu=replace(FOUR.gpu, measured={})))
    numbers = {f"[{index + 1}]" for index in range(len(stated.rates))}
    for cost in stated.stages:
        [row] = [line for line in str(stated).splitlines() if line.startswith(f"{cost.stage} ")]
        found = row.partition(cost.time.bound)[2].strip().replace("][", "] [").split()
        assert set(found) <= numbers
        assert len(found) == len(cost.time.rates) > 0
    assert "training in bf16: 396 TFLOP/s a card, stated: 40% of the maker's 989" in str(stated)
    rates = {
        ("training", "bf16"): Measured(100.0, STEP_GFLOP, "a table"),
        ("sampling", "fp32"): Measured(50.0, UNET.gflop, "a table"),
    }
    machine = replace(FOUR, gpu=replace(FOUR.gpu, measured=rates))
    found = plan_of("paper", machine, pretrain__gradient_checkpointing="none")
    hours = {cost.stage: cost.time.hours for cost in found.stages}
    assert hours["pretrain"] == pytest.approx(1_281_167 * 100 / (4 * 100) / 3600)
    passes, decoding = 50_000 * 100 / (4 * 50) / 3600, 50_000 * 622.2 / (4 * 26_800) / 3600
    assert hours["generate"] == pytest.approx(passes + decoding)
    assert "training in bf16: 105 TFLOP/s a card, measured (a table)" in str(found)
    assert "decoding in fp32: 26.8 TFLOP/s a card, stated" in str(found)


def test_compiled_rates_are_for_what_is_compiled_and_measured():
    """Those of docs/benchmarks.md: training 178.1 -> 225.1 images/s, sampling 112.6 -> 63.4 ms."""

    def hours(compiled: str, stage: str) -> float:
        params = params_of("paper", {"generate.precision": "bf16"})
        images = ImageCounts.assumed(params)
        found = plan(params, FOUR, images, num_workers=8, compiled_stages=compiled)
        return next(cost.time.hours for cost in found.stages if cost.stage == stage)

    assert hours("sampling", "pretrain") == hours("none", "pretrain")
    assert hours("all", "pretrain") == pytest.approx(hours("none", "pretrain") * 178.1 / 225.1)
    assert hours("all", "generate") == hours("sampling", "generate")
    assert 0.5 < hours("all", "generate") / hours("none", "generate") < 0.7
    assert hours("all", "features") == hours("none", "features")  # not measured


@pytest.mark.parametrize(
    ("driver_name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_cards_are_known_by_their_drivers_names_and_slower_namesakes_are_not(
    driver_name: str, tflops: float | None
):
    assert peak_bf16(driver_name) == tflops


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        ("--preset paper --gpus 4", 0, "images: 1,281,167 for training"),
        ("--preset paper --gpus 8 --gpu-memory 40", 0, "Everything fits."),
        ("--preset stable-diffusion-1-5 --gpus 4", 0, "images: 1,281,167 for training"),
        ("--preset stable-diffusion-2-1 --gpus 4", 0, "2.1% more FLOPs"),
        ("--preset paper --gpus 1", 1, "Does not fit: pretrain needs"),
        ("--preset tiny", 1, "a plan knows the costs of CompVis"),
        ("--preset paper --gpus 0", 2, "Invalid value for '--gpus'"),
        ("--preset paper --gpu tpu", 1, "--gpu: 'tpu' is unknown; type one of: h100"),
        ("--preset papers", 1, "--preset: 'papers' is no preset; type one of: paper"),
        ("", 1, "params.yaml: no such file; go to the project's root, or type `contradiff preset"),
    ],
)
def test_the_command_prints_the_plan_and_its_exit_code_tells_whether_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, arguments: str, exit_code: int, text: str
):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["plan", *arguments.split()])
    assert done.exit_code == exit_code
    assert text in done.output
