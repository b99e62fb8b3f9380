"""Only the table learns, resumably, and a wrong table is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from contradiff.base.loading import load_unet
from contradiff.data.streams import PairedShards
from contradiff.generation import class_table as class_condition
from contradiff.generation.class_table import (
    ClassConditionParams,
    ClassTable,
    choose_denoiser,
    count_steps,
    load_class_table,
    read_class_config,
    save_class_table,
    train_class_table,
)
from contradiff.method.model import ContraDiff
from contradiff.method.noise import add_noise

Build = Callable[..., ContraDiff]

PARAMS: dict[str, Any] = {
    "epochs": 2,
    "width": 8,
    "drop": 0.3,
    "batch_size": 6,
    "lr": 0.02,
    "lora": True,
}
NUM_STEPS = 8  # 24 images, six a step, two epochs


class Killed(BaseException):
    """As SIGTERM makes it: nothing handles it on the way."""


@pytest.fixture
def pairs(tiny_data: Path) -> PairedShards:
    return PairedShards.open(tiny_data / "images", tiny_data / "latents", split="train")


@pytest.fixture
def train(pairs: PairedShards, tmp_path: Path) -> Callable[..., None]:
    """Call `train_class_table` with small settings; keywords change them."""

    def run(model: ContraDiff, table: ClassTable, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "params": ClassConditionParams.model_validate(PARAMS | changes.pop("params", {})),
            "precision": "fp32",
            "seed": 0,
            "device": torch.device("cpu"),
            "work_dir": tmp_path,
            "num_workers": 0,
            "log_every": 3,
            "checkpoint_every": 1000,
            "on_step": lambda *_: None,
        }
        train_class_table(model, table, pairs, **(settings | changes))

    return run


Train = Callable[..., None]


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
    expected = 1001 * 512 + 512 * 768 + 768
    assert sum(parameter.numel() for parameter in table.parameters()) == expected == 906_496
    assert table.null_label == 1000


@torch.no_grad()
def test_a_label_gives_one_token_which_starts_at_zero():
    table = new_table()
    labels = torch.tensor([2, 0, 3, 2])
    assert table(labels).shape == (4, 1, 16)
    assert not table(labels).any()
    table.to_tokens.weight.normal_()
    tokens = table(labels)
    assert torch.equal(tokens[0], tokens[3])
    for row, label in enumerate(labels):
        expected = table.to_tokens.weight @ table.embedding.weight[label]
        torch.testing.assert_close(tokens[row, 0], expected)


def test_only_the_table_changes(build_tiny: Build, train: Train):
    model, table = build_tiny(), new_table()
    frozen, before = state_of(model), state_of(table)
    train(model, table)
    assert changed(model, frozen) == set()
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert changed(table, before) == set(before)
    assert not table.training


def test_every_class_and_the_null_class_learn_by_drop_alone(build_tiny: Build, train: Train):
    rows: dict[float, Tensor] = {}
    for drop in (0.0, 0.5):
        table = new_table(num_classes=4)  # of which the data has three
        before = table.embedding.weight.detach().clone()
        train(build_tiny(), table, params={"drop": drop}, work_dir=Path("nowhere"))
        rows[drop] = (table.embedding.weight != before).any(dim=1)
    assert rows[0.0].tolist() == [True, True, True, False, False]
    assert rows[0.5].tolist() == [True, True, True, False, True]


def noise_error(model: ContraDiff, table: ClassTable, pairs: PairedShards) -> float:
    """Eq. 3 at fixed noise, for every training image's centre crop with its own label."""
    from contradiff.base.vae import mode
    from contradiff.data.latents import StoredLatents
    from contradiff.data.shards import image_of

    records = [pair for shard in range(pairs.num_shards) for pair in pairs.read(shard)]
    labels = torch.tensor([image_of(image).label for image, _ in records])
    moments = [torch.from_numpy(StoredLatents.of_record(r).moments[0]) for _, r in records]
    scale = pairs.latent_index.info.scaling_factor
    latents = mode(torch.stack(moments), scaling_factor=scale)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.arange(0, 1000, 42)[: len(latents)]
    noisy = add_noise(latents, noise, timesteps, model.schedule.alphas_cumprod)
    with torch.no_grad():
        noise_pred = model.noise_pred(noisy, timesteps, table(labels))
    return (noise_pred - noise).square().mean().item()


def test_the_loss_falls(build_tiny: Build, train: Train, pairs: PairedShards):
    model, table = build_tiny(), new_table()
    before = noise_error(model, table, pairs)
    train(model, table, params={"epochs": 6, "lr": 0.05, "drop": 0.1})
    assert noise_error(model, table, pairs) < 0.97 * before


def test_a_step_is_the_loss_written_out(
    build_tiny: Build, train: Train, pairs: PairedShards, monkeypatch: pytest.MonkeyPatch
):
    """One step on all images, taken in parts or not.

    The loss is near Eq. 3's at fixed noise, and Adam's first update is the gradient's sign.
    """
    losses: dict[int, list[float | None]] = {}
    tables: dict[int, ClassTable] = {}
    for at_once in (7, 24):
        monkeypatch.setattr(class_condition, "MICROBATCH_SIZE", at_once)
        tables[at_once], losses[at_once] = new_table(), []
        train(
            build_tiny(),
            tables[at_once],
            params={"batch_size": 24, "epochs": 1, "lr": 0.01},
            on_step=lambda _, row, at_once=at_once: losses[at_once].append(row["loss"]),
            work_dir=Path("nowhere"),
        )
    expected = noise_error(build_tiny(), new_table(), pairs)
    assert losses[24] == [pytest.approx(expected, rel=0.1)]
    assert losses[7] == [pytest.approx(losses[24][0], rel=1e-5)]
    update = tables[24].to_tokens.bias.detach()
    assert update.abs().tolist() == pytest.approx([0.01] * 16, rel=1e-3)
    torch.testing.assert_close(tables[7].to_tokens.bias.detach(), update)


def test_view_0_is_what_is_learnt_from(
    build_tiny: Build, train: Train, monkeypatch: pytest.MonkeyPatch, pairs: PairedShards
):
    """The random crops are distorted in colour."""
    from contradiff.data.latents import StoredLatents

    centre = {
        StoredLatents.of_record(record).moments[0].tobytes()
        for shard in range(pairs.num_shards)
        for _, record in pairs.read(shard)
    }
    seen: list[Tensor] = []
    sample = class_condition.sample

    def spy(moments: Tensor, **settings: Any) -> Tensor:
        seen.extend(moments)
        return sample(moments, **settings)

    monkeypatch.setattr(class_condition, "sample", spy)
    train(build_tiny(), new_table(), params={"epochs": 1})
    assert len(seen) == 24
    assert {moments.numpy().tobytes() for moments in seen} == centre


def kill_at(step: int) -> Callable[[int, float | None], None]:
    def on_step(done: int, _loss: float | None) -> None:
        if done == step:
            raise Killed

    return on_step


@pytest.mark.parametrize(("killed_at", "num_workers"), [(1, 0), (5, 2)])
def test_killed_and_resumed_equals_uninterrupted(
    build_tiny: Build, train: Train, tmp_path: Path, killed_at: int, num_workers: int
):
    whole = new_table()
    losses: list[float | None] = []
    train(
        build_tiny(),
        whole,
        work_dir=tmp_path / "whole",
        num_workers=num_workers,
        on_step=lambda _, loss: losses.append(loss),
    )
    assert [loss is not None for loss in losses] == [
        step in (3, 6, 8) for step in range(1, NUM_STEPS + 1)
    ]

    every: dict[str, Any] = {
        "work_dir": tmp_path / "cut",
        "checkpoint_every": 2,
        "num_workers": num_workers,
    }
    with pytest.raises(Killed):
        train(build_tiny(), new_table(), on_step=kill_at(killed_at), **every)
    # As after a restart: other weights in memory, another state of the global generator.
    resumed = new_table(seed=0 if killed_at <= 2 else 5)
    torch.manual_seed(99)
    steps: list[int] = []
    train(build_tiny(), resumed, on_step=lambda step, _: steps.append(step), **every)
    assert steps == list(range((killed_at - 1) // 2 * 2 + 1, NUM_STEPS + 1))
    assert changed(resumed, state_of(whole)) == set()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_models_passes_have_the_precision_and_the_table_is_float32(
    build_tiny: Build, train: Train, precision: str, dtype: torch.dtype
):
    model, table = build_tiny(), new_table()
    seen: set[torch.dtype] = set()
    model.unet.conv_in.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    train(model, table, precision=precision)
    assert seen == {dtype}
    assert {tensor.dtype for tensor in table.state_dict().values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in table.state_dict().values())


@pytest.fixture
def quick(build_tiny: Build, monkeypatch: pytest.MonkeyPatch) -> tuple[ContraDiff, list[Tensor]]:
    """A model that runs no UNet, and the timesteps that it will have been given."""
    model, seen = build_tiny(), []

    def noise_pred(noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        seen.append(timesteps)
        return noisy * tokens.mean()

    monkeypatch.setattr(model, "noise_pred", noise_pred)
    return model, seen


def test_each_image_draws_its_own_timestep_of_all_and_drops_its_label_alone(
    quick: tuple[ContraDiff, list[Tensor]], train: Train
):
    (model, timesteps), table = quick, new_table()
    labels: list[Tensor] = []
    table.register_forward_pre_hook(lambda _, args: labels.append(args[0]))
    train(model, table, params={"batch_size": 24, "epochs": 40})
    assert len(timesteps) == len(labels) == 40
    assert all(len(steps.unique()) > 12 for steps in timesteps)
    # 240 of 960 are expected in each quarter, with a standard deviation of 13
    quarters = torch.histc(torch.cat(timesteps).float(), bins=4, min=0, max=1000)
    assert quarters.sum() == 960
    assert (quarters - 240).abs().max() < 60
    dropped = torch.stack(labels) == table.null_label
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert dropped.any(dim=1).all()
    assert not dropped.all(dim=1).any()


def test_the_rate_warms_up_over_a_fiftieth_and_falls_along_a_cosine(
    quick: tuple[ContraDiff, list[Tensor]], train: Train, monkeypatch: pytest.MonkeyPatch
):
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        rates.extend({group["lr"] for group in optimizer.param_groups})
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(quick[0], new_table(), params={"epochs": 25})  # 100 steps
    cosine = [0.01 * (1 + math.cos(math.pi * number / 98)) for number in range(98)]
    assert rates == pytest.approx([0, 0.01, *cosine])


def test_diverged_training_ends_with_a_message(build_tiny: Build, train: Train):
    with pytest.raises(ValueError, match=r"^class_condition\.lr: loss is (nan|inf) at step \d"):
        train(build_tiny(), new_table(), params={"lr": 1e30})


def test_batch_larger_than_the_data_is_named(build_tiny: Build, train: Train):
    expected = r"^class_condition\.batch_size: 25 is more than the 24 images$"
    with pytest.raises(ValueError, match=expected):
        train(build_tiny(), new_table(), params={"batch_size": 25})


def test_no_epochs_need_no_data():
    params = ClassConditionParams.model_validate(PARAMS | {"epochs": 0, "batch_size": 25})
    assert count_steps(params, num_samples=24) == 0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"epochs": -1}, "greater than or equal to 0"),
        ({"width": 0}, "greater than or equal to 1"),
        ({"drop": 1.0}, "less than 1"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"lr": 0.0}, "greater than 0"),
        ({"lora": 1}, "boolean"),
    ],
)
def test_impossible_parameters_are_refused(changes: dict[str, Any], fault: str):
    with pytest.raises(ValidationError, match=fault):
        ClassConditionParams.model_validate(PARAMS | changes)


@torch.no_grad()
def test_without_lora_the_denoiser_is_the_base(build_tiny: Build, tiny_base: Path):
    """Nothing that was trained in it is left, self-conditioning neither; with LoRA all of it is."""
    generator = torch.Generator().manual_seed(0)
    noisy, tokens = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 1, 16))
    )
    steps = torch.tensor([3, 700])
    base = load_unet(tiny_base)(noisy, steps, encoder_hidden_states=tokens).sample
    for lora in (True, False):
        model = build_tiny(head={"self_conditioning": True})
        trained = model.noise_pred(noisy, steps, tokens)
        assert not torch.allclose(trained, base, atol=1e-3)
        choose_denoiser(model, lora=lora)
        found = model.noise_pred(noisy, steps, tokens)
        torch.testing.assert_close(found, trained if lora else base, rtol=1e-4, atol=1e-5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "pretrain"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"some weights")
    return folder


def save(folder: Path, table: ClassTable | None, checkpoint: Path, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "num_classes": 3,
        "num_steps": 8,
        "params": ClassConditionParams.model_validate(PARAMS),
    }
    save_class_table(folder, table, checkpoint=checkpoint, **(settings | changes))


def test_saved_table_is_the_same_again(tmp_path: Path, checkpoint: Path):
    table = new_table()
    table.to_tokens.weight.data.normal_()
    save(tmp_path / "table", table, checkpoint)
    loaded = load_class_table(tmp_path / "table", checkpoint=checkpoint)
    assert changed(loaded, state_of(table)) == set()
    assert not loaded.training
    config = read_class_config(tmp_path / "table")
    assert len(config.pop("checkpoint_sha256")) == 64
    assert config == {"drop": 0.3, "lora": True, "num_classes": 3, "num_steps": 8, "width": 8}


def test_table_of_another_checkpoint_is_refused(tmp_path: Path, checkpoint: Path):
    save(tmp_path / "table", new_table(), checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(
        ValueError, match=r"trained with another model .*; run `dvc repro class_cond"
    ):
        load_class_table(tmp_path / "table", checkpoint=checkpoint)


def test_untrained_table_is_refused(tmp_path: Path, checkpoint: Path):
    save(tmp_path / "table", None, checkpoint, num_steps=0)
    assert [path.name for path in (tmp_path / "table").iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "table/config.json").read_text())["num_steps"] == 0
    expected = r"class_condition\.epochs is 0.*generate\.condition: class"
    with pytest.raises(ValueError, match=expected):
        load_class_table(tmp_path / "table", checkpoint=checkpoint)


def test_missing_table_is_named(tmp_path: Path, checkpoint: Path):
    with pytest.raises(ValueError, match=r"config\.json: no table of classes; run `dvc repro"):
        load_class_table(tmp_path / "nothing", checkpoint=checkpoint)
