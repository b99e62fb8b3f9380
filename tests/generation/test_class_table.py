"""Only the table is trained, the training can be resumed, and wrong tables are refused."""

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from contradiff.base.loading import NoiseSchedule, load_unet
from contradiff.base.vae import mode
from contradiff.data.latents import StoredLatents
from contradiff.data.pairs import PairedShards
from contradiff.data.shards import image_of
from contradiff.generation import class_table
from contradiff.generation.class_table import ClassTable
from contradiff.generation.class_table_folder import save_class_table
from contradiff.generation.params import ClassConditionParams
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import add_noise
from contradiff.watch import Watch
from tests.settings import DAMAGES

Build = Callable[..., ContraDiffModel]
Train = Callable[..., None]

PARAMS = ClassConditionParams(epochs=2, width=8, drop=0.3, batch_size=6, lr=0.02, lora=True)
NUM_STEPS = 8  # 24 images, six a step, two epochs


class Killed(BaseException):
    """Ends the training as SIGTERM would: no `except Exception` catches it."""


@pytest.fixture
def pairs(tiny_data: Path) -> PairedShards:
    return PairedShards.open(tiny_data / "images", tiny_data / "latents", split="train")


@pytest.fixture
def centres(pairs: PairedShards) -> tuple[Tensor, Tensor]:
    """Return the labels and the moments of all training images' centre crops (view 0)."""
    records = [pair for shard in range(pairs.num_shards) for pair in pairs.read(shard)]
    moments = [torch.from_numpy(StoredLatents.of_record(r).moments[0]) for _, r in records]
    return torch.tensor([image_of(image).label for image, _ in records]), torch.stack(moments)


@pytest.fixture
def train(pairs: PairedShards, tmp_path: Path) -> Train:
    """Return a function that calls `train_class_table` with small settings and given changes.

    Each call has a work folder of its own: a finished training is not trained again.
    """
    numbers = count()

    def run(model: ContraDiffModel, table: ClassTable, **changes: Any) -> None:
        work_dir = tmp_path / str(next(numbers))
        work_dir.mkdir()
        settings: dict[str, Any] = {"precision": "fp32", "seed": 0, "work_dir": work_dir}
        settings |= {"num_workers": 0, "log_every": 3, "checkpoint_every": 1000}
        settings["watch"] = Watch(num_steps=0, batch_size=0, device=None)
        settings |= {"on_step": lambda *_: None} | changes
        settings["params"] = PARAMS.model_copy(update=settings.get("params"))
        class_table.train_class_table(model, table, pairs, **settings)

    return run


def new_table(*, seed: int = 0, num_classes: int = 3) -> ClassTable:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClassTable(num_classes=num_classes, width=8, cross_attention_dim=16)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    after = module.state_dict()
    assert after.keys() == before.keys()
    return {name for name in after if not after[name].equal(before[name])}


def test_parameter_count_at_the_paper_s_scale():
    table = ClassTable(num_classes=1000, width=512, cross_attention_dim=768)
    assert sum(parameter.numel() for parameter in table.parameters()) == 906_496
    assert table.null_label == 1000


@torch.no_grad()
def test_a_label_gives_one_token_which_starts_at_zero():
    table, labels = new_table(), torch.tensor([2, 0, 3, 2])
    assert table(labels).shape == (4, 1, 16)
    assert not table(labels).any()
    table.to_tokens.weight.normal_()
    for token, label in zip(table(labels), labels, strict=True):
        expected = table.to_tokens.weight @ table.embedding.weight[label]
        torch.testing.assert_close(token[0], expected)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_only_the_table_changes_in_float32_and_the_model_has_the_precision(
    build_tiny: Build, train: Train, precision: str, dtype: torch.dtype
):
    model, table = build_tiny(), new_table()
    frozen, before = state_of(model), state_of(table)
    seen: set[torch.dtype] = set()
    model.unet.conv_in.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    train(model, table, precision=precision)
    assert seen == {dtype}
    now = model.state_dict()
    assert changed(model, {name: frozen[name].to(now[name].dtype) for name in frozen}) == set()
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert changed(table, before) == set(before)
    for tensor in table.state_dict().values():
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def test_every_class_and_the_null_class_learn_by_drop_alone(build_tiny: Build, train: Train):
    for drop in (0.0, 0.5):
        table = new_table(num_classes=4)  # the data has three classes
        before = table.embedding.weight.detach().clone()
        train(build_tiny(), table, params={"drop": drop})
        learned = (table.embedding.weight != before).any(dim=1)
        assert learned.tolist() == [True, True, True, False, drop > 0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_is_the_loss_written_out(  # noqa: PLR0917
    build_tiny: Build,
    train: Train,
    pairs: PairedShards,
    centres: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
):
    """Microbatches change nothing. Adam's first update is the rate times the gradient's sign."""

    def build() -> ContraDiffModel:
        model = build_tiny()
        own = model.schedule.scheduler
        model.schedule = NoiseSchedule(type(own).from_config(own.config, prediction_type=kind))
        return model

    @torch.no_grad()
    def error_of(model: ContraDiffModel, table: ClassTable) -> float:
        labels, moments = centres
        latents = mode(moments, scaling_factor=pairs.latent_index.info.scaling_factor)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
        timesteps = torch.arange(0, 1000, 42)[: len(latents)]
        noisy = add_noise(latents, noise, timesteps, model.schedule.alphas_cumprod)
        velocity = model.schedule.scheduler.get_velocity(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
        target = noise if kind == "epsilon" else velocity
        return (model.predict(noisy, timesteps, table(labels)) - target).square().mean().item()

    losses: list[float] = []
    updates: list[Tensor] = []
    for at_once in (24, 7):
        monkeypatch.setattr(class_table, "MICROBATCH_SIZE", at_once)
        table = new_table()
        report = {"on_step": lambda _, row: losses.append(row["loss"])}
        train(build(), table, params={"batch_size": 24, "epochs": 1, "lr": 0.01}, **report)
        updates.append(table.to_tokens.bias.detach())
    model, table = build(), new_table()
    before = error_of(model, table)
    # At other timesteps, the error of v is another; that of the noise is hardly.
    assert losses[0] == pytest.approx(before, rel=0.1 if kind == "epsilon" else 0.25)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert updates[0].abs().tolist() == pytest.approx([0.01] * 16, rel=1e-3)
    torch.testing.assert_close(updates[1], updates[0])
    train(model, table, params={"epochs": 6, "lr": 0.05, "drop": 0.1})
    assert error_of(model, table) < 0.97 * before


def test_view_0_is_what_is_learnt_from(
    build_tiny: Build, train: Train, monkeypatch: pytest.MonkeyPatch, centres: tuple[Tensor, Tensor]
):
    """Views other than 0 are random crops with distorted colours."""
    seen: list[Tensor] = []
    sample = class_table.sample

    def spy(moments: Tensor, **settings: Any) -> Tensor:
        seen.extend(moments)
        return sample(moments, **settings)

    monkeypatch.setattr(class_table, "sample", spy)
    train(build_tiny(), new_table(), params={"epochs": 1})
    found, expected = ([m.numpy().tobytes() for m in moments] for moments in (seen, centres[1]))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(("killed_at", "num_workers"), [(1, 0), (5, 2)])
def test_killed_and_resumed_equals_uninterrupted(
    build_tiny: Build, train: Train, tmp_path: Path, killed_at: int, num_workers: int
):
    whole, reported = new_table(), list[int]()

    def report(step: int, row: Any) -> None:
        reported.extend([step] if row else [])

    train(build_tiny(), whole, work_dir=tmp_path / "whole", num_workers=num_workers, on_step=report)
    assert reported == [3, 6, 8]

    def kill(done: int, _: Any) -> None:
        if done == killed_at:
            raise Killed

    every = {"work_dir": tmp_path, "checkpoint_every": 2, "num_workers": num_workers}
    with pytest.raises(Killed):
        train(build_tiny(), new_table(), on_step=kill, **every)
    # A restart has other weights in memory and another state of the global generator.
    resumed = new_table(seed=0 if killed_at <= 2 else 5)
    torch.manual_seed(99)
    steps: list[int] = []
    train(build_tiny(), resumed, on_step=lambda step, _: steps.append(step), **every)
    assert steps == list(range((killed_at - 1) // 2 * 2 + 1, NUM_STEPS + 1))
    assert changed(resumed, state_of(whole)) == set()


@pytest.fixture
def quick(
    build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> tuple[ContraDiffModel, list[Tensor]]:
    """Return a model that skips its UNet, and a list that collects the timesteps it gets."""
    model, seen = build_tiny(), []

    def predict(noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        seen.append(timesteps)
        return noisy * tokens.mean()

    monkeypatch.setattr(model, "predict", predict)
    return model, seen


def test_each_image_draws_its_own_timestep_of_all_and_drops_its_label_alone(
    quick: tuple[ContraDiffModel, list[Tensor]], train: Train
):
    (model, timesteps), table = quick, new_table()
    labels: list[Tensor] = []
    table.register_forward_pre_hook(lambda _, args: labels.append(args[0]))
    train(model, table, params={"batch_size": 24, "epochs": 40})
    assert all(len(steps.unique()) > 12 for steps in timesteps)
    # each quarter of the range should get 240 of 960 draws, with a standard deviation of 13
    quarters = torch.histc(torch.cat(timesteps).float(), bins=4, min=0, max=1000)
    assert quarters.sum() == 960
    assert (quarters - 240).abs().max() < 60
    dropped = torch.stack(labels) == table.null_label
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert dropped.any(dim=1).all()
    assert not dropped.all(dim=1).any()


def test_the_rate_warms_up_over_a_fiftieth_and_falls_along_a_cosine(
    quick: tuple[ContraDiffModel, list[Tensor]], train: Train
):
    rates: list[float] = []
    # the training has 100 steps, and each one reports its learning rate
    report: dict[str, Any] = {"log_every": 1, "on_step": lambda _, row: rates.append(row["lr"])}
    train(quick[0], new_table(), params={"epochs": 25}, **report)
    cosine = [0.01 * (1 + math.cos(math.pi * number / 98)) for number in range(98)]
    assert rates == pytest.approx([0, 0.01, *cosine])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"lr": 1e30},
            r"^class_condition\.lr: the training diverged \(loss is (nan|inf) at step \d",
        ),
        (
            {"batch_size": 25},
            r"^class_condition\.batch_size: 25 is more than the 24 images; lower it$",
        ),
    ],
)
def test_training_that_cannot_succeed_names_its_parameter(
    build_tiny: Build, train: Train, change: dict[str, Any], expected: str
):
    with pytest.raises(ValueError, match=expected):
        train(build_tiny(), new_table(), params=change)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", -1), ("width", 0), ("drop", 1.0), ("batch_size", 0), ("lr", 0.0), ("lora", 1)],
)
def test_impossible_parameters_are_refused(name: str, value: Any):
    with pytest.raises(ValidationError, match=name):
        ClassConditionParams(**(PARAMS.model_dump() | {name: value}))


@torch.no_grad()
def test_without_lora_the_denoiser_is_the_base(build_tiny: Build, tiny_base: Path):
    """Without LoRA, self-conditioning is also off; with LoRA, nothing changes."""
    generator = torch.Generator().manual_seed(0)
    noisy, tokens = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 1, 16))
    )
    steps = torch.tensor([3, 700])
    base = load_unet(tiny_base)(noisy, steps, encoder_hidden_states=tokens).sample
    for lora in (True, False):
        model = build_tiny(head={"self_conditioning": True})
        trained = model.predict(noisy, steps, tokens)
        assert not torch.allclose(trained, base, atol=1e-3)
        class_table.choose_denoiser(model, lora=lora)
        found = model.predict(noisy, steps, tokens)
        torch.testing.assert_close(found, trained if lora else base, rtol=1e-4, atol=1e-5)


def test_a_saved_table_is_the_same_again_for_its_checkpoint_alone(tmp_path: Path):
    """Tables without training are tested with the stage."""
    folder, weights = tmp_path / "table", tmp_path / "model.safetensors"
    weights.write_bytes(b"some weights")
    with pytest.raises(ValueError, match=r"config\.json: no such file; run `dvc repro class_"):
        class_table.load_class_table(folder, checkpoint=tmp_path)
    table = new_table()
    table.to_tokens.weight.data.normal_()
    save_class_table(folder, table, checkpoint=tmp_path, num_classes=3, num_steps=8, params=PARAMS)
    loaded = class_table.load_class_table(folder, checkpoint=tmp_path)
    assert changed(loaded, state_of(table)) == set()
    path = folder / "table.safetensors"
    whole = path.read_bytes()
    for damage in DAMAGES.values():
        path.write_bytes(damage(whole))
        with pytest.raises(ValueError, match=rf"^{path}: damaged \(its sha256 is"):
            class_table.load_class_table(folder, checkpoint=tmp_path)
    weights.write_bytes(b"other weights")
    expected = r"trained with another model .*; run `dvc repro class_cond"
    with pytest.raises(ValueError, match=expected):
        class_table.load_class_table(folder, checkpoint=tmp_path)
