"""A resumed training ends with the same weights; wrong parameters are named."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from contradiff.method.model import ContraDiffModel
from contradiff.method.objective import TrainingBatch, TrainingStep
from contradiff.training import pretraining as training
from contradiff.training.recipe import PretrainParams, TrainingRecipe
from tests.settings import norms_in_bfloat16

Build, Recipe = Callable[..., ContraDiffModel], Callable[..., TrainingRecipe]
Train = Callable[..., list[dict[str, float]]]
Row = Mapping[str, float] | None

ONE_EPOCH = {"epochs": 1}
NUM_STEPS = 8  # 24 images, six per step, two epochs


class Killed(BaseException):
    """Simulates SIGTERM: no `except Exception` catches it."""


def state_of(model: ContraDiffModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: ContraDiffModel, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that differ from `before` in any bit."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name in after if not after[name].equal(before[name])}


@pytest.mark.parametrize(
    ("killed_at", "settings"),
    [
        (1, {}),
        (6, {"loss": {"latent_views": "same"}, "conditioner": {"cond_view": "same"}}),
        (7, {"loss": {"lambda": 0.0}, "conditioner": {"cond_view": "noise"}}),
        (5, {"pretrain": {"grad_accumulation": 3, "ema_decay": 0.5}, "num_workers": 2}),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    build_tiny: Build, train: Train, tmp_path: Path, killed_at: int, settings: dict[str, Any]
):
    whole = build_tiny()
    alone = settings | {"num_workers": 0}  # the order of the data does not depend on workers
    expected = train(whole, work_dir=tmp_path / "whole", **alone)
    assert len(expected) == NUM_STEPS

    def kill(done: int, _: Row) -> None:
        if done == killed_at:
            raise Killed

    every = {"work_dir": tmp_path / "cut", "checkpoint_every": 2} | settings
    with pytest.raises(Killed):
        train(build_tiny(), on_step=kill, **every)
    assert (tmp_path / "cut" / "state.safetensors").exists() == (killed_at > 2)
    # Simulate a restart: other weights in memory, another state of the global generator.
    resumed = build_tiny() if killed_at <= 2 else build_tiny(seed=5)
    torch.manual_seed(99)
    steps: list[int] = []
    curve = train(resumed, on_step=lambda step, _: steps.append(step), **every)
    assert steps == list(range((killed_at - 1) // 2 * 2 + 1, NUM_STEPS + 1))
    assert curve == expected
    # The frozen base is equal too. It is not in the state but from the same folder.
    assert changed(resumed, state_of(whole)) == set()


@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_trained_parts_change_and_the_base_does_not(build_tiny: Build, train: Train, weight: float):
    """Without contrast, the attention head does not change either."""
    model = build_tiny()
    before = state_of(model)
    curve = train(model, pretrain=ONE_EPOCH, loss={"lambda": weight})
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {name.split(".")[0] for name in expected}
    assert parts == {"unet", "conditioner"} | ({"attention", "projector"} if weight else set())
    assert all("lora_" in name for name in expected if name.startswith("unet."))
    if weight:
        expected |= {name for name in before if "running_" in name or "num_batches" in name}
    assert changed(model, before) == expected
    assert all(("contrastive" in row) == bool(weight) for row in curve)
    assert all((row["loss"] == row["reconstruction"]) == (not weight) for row in curve)


@pytest.mark.parametrize("cond_view", ["same", "crop", "noise"])
def test_latents_condition_as_pixels_do(build_tiny: Build, train: Train, cond_view: str):
    model = build_tiny(conditioner={"input": "latents", "patch_size": 2})
    before = state_of(model)
    train(model, pretrain=ONE_EPOCH, conditioner={"cond_view": cond_view})
    after = {name for name in changed(model, before) if name.startswith("conditioner.")}
    assert after == {f"conditioner.{name}" for name, _ in model.conditioner.named_parameters()}


class Recorder:
    """Records each batch of a training, and the gradients and settings of each step."""

    def __init__(self, model: ContraDiffModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[TrainingBatch] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.groups: list[list[dict[str, Any]]] = []
        forward, step = TrainingStep.forward, torch.optim.AdamW.step

        def seen(training_step: TrainingStep, batch: TrainingBatch) -> dict[str, Tensor]:
            if training_step.model is model:
                self.batches.append(batch)
            return forward(training_step, batch)

        def recorded(optimizer: torch.optim.AdamW, *args: Any) -> Any:
            named = model.named_parameters()
            self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            self.groups.append([dict(group) for group in optimizer.param_groups])
            return step(optimizer, *args)

        monkeypatch.setattr(TrainingStep, "forward", seen)
        monkeypatch.setattr(torch.optim.AdamW, "step", recorded)


def test_optimizer_has_the_settings_and_a_clipped_gradient(
    build_tiny: Build, train: Train, monkeypatch: pytest.MonkeyPatch
):
    model = build_tiny()
    seen = Recorder(model, monkeypatch)
    settings = {"lr": 0.01, "beta1": 0.8, "beta2": 0.7, "weight_decay": 0.03}
    settings |= {"epochs": 3, "warmup_epochs": 1, "batch_size": 24, "scale_lr": True}
    curve = train(model, pretrain=settings | {"max_grad_norm": 0.01}, log_every=1)
    peak = 0.01 * 24 / 256
    for lr, groups in zip((0.0, peak, peak / 2), seen.groups, strict=True):
        assert [group["lr"] for group in groups] == pytest.approx([lr, lr])
        assert [group["betas"] for group in groups] == [(0.8, 0.7)] * 2
        assert [group["weight_decay"] for group in groups] == [0.03, 0.0]
    for row, gradients in zip(curve, seen.gradients, strict=True):
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert norm == pytest.approx(0.01, rel=1e-3)
        assert row["grad_norm"] > 0.02  # the norm before clipping


def test_accumulated_gradient_is_the_mean_of_the_microbatches(
    build_tiny: Build, train: Train, recipe_of: Recipe, monkeypatch: pytest.MonkeyPatch
):
    model, copy = build_tiny(), build_tiny().train()
    seen = Recorder(model, monkeypatch)
    changes = ONE_EPOCH | {"grad_accumulation": 3, "max_grad_norm": 1e9, "warmup_epochs": 0}
    curve = train(model, log_every=1, pretrain=changes)
    assert [batch.latents.shape[1] for batch in seen.batches] == [2] * 12  # 24 images, each once
    step = TrainingStep(copy, loss=recipe_of().loss, decode_batch_size=0)
    mean = torch.stack([step(batch)["loss"] for batch in seen.batches[:3]]).mean()
    mean.backward()
    assert curve[0]["loss"] == pytest.approx(mean.item(), rel=1e-5)
    expected = {n: p.grad for n, p in copy.named_parameters() if p.grad is not None}
    torch.testing.assert_close(seen.gradients[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("checkpointing", "decode_batch_size", "recomputed"),
    [
        ("down.0", 0, {"down_blocks.0"}),
        ("all", 0, {"down_blocks", "mid_block", "up_blocks"}),
        ("none", 4, set()),
        ("all", 4, {"down_blocks", "mid_block", "up_blocks"}),
    ],
)
def test_saving_memory_leaves_the_gradients_and_reaches_lora(
    build_tiny: Build,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    *,
    checkpointing: str,
    decode_batch_size: int,
    recomputed: set[str],
):
    """The frozen UNet's inputs need no gradient, so only non-reentrant checkpointing works."""
    found: list[list[dict[str, Tensor]]] = []
    rows: list[int] = []
    saving = {"gradient_checkpointing": checkpointing, "decode_batch_size": decode_batch_size}
    for changes in ({}, saving):
        model = build_tiny()
        rows.clear()
        model.unet.up_blocks[-1].register_forward_hook(lambda *args: rows.append(len(args[2])))
        with monkeypatch.context() as patch:
            found.append(Recorder(model, patch).gradients)
            train(model, pretrain=ONE_EPOCH | changes)
        assert max(rows) == (changes.get("decode_batch_size") or 6)
        on = [n for n, m in model.unet.named_modules() if getattr(m, "gradient_checkpointing", 0)]
        places = {part for part in recomputed for name in on if name.startswith(part)}
        assert places == (recomputed if changes else set())
        assert all(name.startswith(tuple(recomputed)) for name in on)
    assert len(found[0]) == 4
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert all(gradient.any() for name, gradient in found[1][1].items() if "lora_" in name)


def test_frozen_weights_in_half_precision_are_autocast_s_own(
    build_tiny: Build,
    train: Train,
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """Casting weights once, or by autocast in every pass, gives the same training bit for bit."""
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    saving = {"gradient_checkpointing": "all", "decode_batch_size": 4}
    changes = ONE_EPOCH | saving | {"precision": "bf16"}
    model, uncast, exact = build_tiny(), build_tiny(), build_tiny()
    train(model, work_dir=tmp_path / "cast", pretrain=changes)
    frozen = {p.dtype for p in model.unet.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with monkeypatch.context() as patch:
        patch.setattr(training, "cast_frozen_weights", norms_in_bfloat16)
        train(uncast, work_dir=tmp_path / "uncast", pretrain=changes)
        assert {p.dtype for p in uncast.unet.parameters()} == {torch.bfloat16, torch.float32}
    trained = model.trained_state()
    torch.testing.assert_close(trained, uncast.trained_state(), rtol=0, atol=0)
    monkeypatch.undo()
    train(exact, work_dir=tmp_path / "exact", pretrain=ONE_EPOCH)
    assert any(not tensor.equal(trained[name]) for name, tensor in exact.trained_state().items())


def test_average_of_the_weights_is_what_is_kept(build_tiny: Build, train: Train):
    """Compare with an average, with decay min(0.3, s / (9 + s)), of the weights after each step."""
    model = build_tiny()
    live = model.conditioner.to_tokens.weight
    weights = [live.detach().clone()]
    record = lambda *_: weights.append(live.detach().clone())  # noqa: E731
    train(model, pretrain={"ema_decay": 0.3}, on_step=record)
    average = weights[0]
    for number, weight in enumerate(weights[1:], start=1):
        decay = min(0.3, number / (9 + number)) if number > 1 else 0.0
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.conditioner.to_tokens.weight.detach(), average)
    assert not torch.allclose(average, weights[-1])


def test_no_epochs_leave_the_model_as_it_is(build_tiny: Build, train: Train, tmp_path: Path):
    model = build_tiny()
    before = state_of(model)
    assert train(model, pretrain={"epochs": 0, "warmup_epochs": 0}) == []
    assert changed(model, before) == set()
    assert list(tmp_path.iterdir()) == []


def test_curve_has_a_row_every_few_steps_and_at_the_end(
    build_tiny: Build, train: Train, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "CURVE_ROWS", 2)  # 7 // 2 = 3: a row every third step
    seen: list[tuple[int, Row]] = []
    changes = {"epochs": 7, "batch_size": 24, "warmup_epochs": 1.0, "lr": 0.5}
    settings = {"log_every": 4, "pretrain": changes, "loss": {"lambda": 0.25}}
    curve = train(build_tiny(), on_step=lambda step, row: seen.append((step, row)), **settings)
    assert [row["step"] for row in curve] == [3, 6, 7]
    assert [step for step, _ in seen] == list(range(1, 8))
    assert [step for step, row in seen if row is not None] == [3, 4, 6, 7]
    assert [row for _, row in seen if row in curve] == curve
    for row in curve:
        assert row.keys() == set(training.CURVE_COLUMNS)
        assert row["epoch"] == row["step"]
        total = row["reconstruction"] + 0.25 * row["contrastive"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    # After warm-up, half a cosine takes six steps. Step 3 is the second of these.
    cosine = 0.5 * (1 + math.cos(math.pi * 1 / 6))
    assert curve[0]["lr"] == pytest.approx(0.5 * cosine, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"batch_size": 28}, "28 is more than the 24 images"),
        ({}, r"6 must be a multiple of 4 \(processes\)"),
        ({"grad_accumulation": 3}, r"6 must .* times 3 \(pretrain\.grad_accumulation\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(
    build_tiny: Build,
    train: Train,
    accelerator: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    changes: dict[str, Any],
    fault: str,
):
    monkeypatch.setattr(type(accelerator), "num_processes", 4)
    with pytest.raises(ValueError, match=rf"^pretrain\.batch_size: {fault}"):
        train(build_tiny(), pretrain=changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"warmup_epochs": 2.0}, r"pretrain\.warmup_epochs is 2, .* pretrain\.epochs"),
        ({"grad_accumulation": 4}, r"pretrain\.grad_accumulation: 4 microbatches .* equal numbers"),
        ({"grad_accumulation": 6}, r"grad_accumulation: 6 microbatches .* two or more each"),
    ],
)
def test_contradicting_parameters_are_refused(
    recipe_of: Recipe, changes: dict[str, Any], fault: str
):
    with pytest.raises(ValidationError, match=fault):
        PretrainParams.model_validate(dict(recipe_of().pretrain) | changes)
