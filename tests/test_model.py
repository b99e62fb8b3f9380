"""contradiff.model: its loss against six whole passes, what it trains, and two processes."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contradiff.checkpoint import load_checkpoint, save_checkpoint
from contradiff.losses import LossParams
from contradiff.model import ContraDiff, TrainingBatch
from contradiff.parameter_counts import count_parameters

Build = Callable[..., ContraDiff]


def watch_maps(model: ContraDiff, block: str) -> list[Tensor]:
    """Of every later whole pass, the maps of `block`."""
    seen: list[Tensor] = []

    def see_up(*args: Any) -> None:
        mid = seen.pop()
        up = F.adaptive_avg_pool2d(args[2], mid.shape[2:])
        seen.append(up if block == "up.1" else torch.cat([mid, up], dim=1))

    model.unet.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    if block != "mid":
        model.unet.up_blocks[1].register_forward_hook(see_up)
    return seen


def loss_params(**changes: Any) -> LossParams:
    return LossParams.model_validate(
        {
            "lambda": 0.3,
            "contrastive": "ntxent",
            "temperature": 0.2,
            "latent_views": "two",
            "recon_passes": 1,
            "min_snr_gamma": 0.0,
        }
        | changes
    )


def draw_batch(num_images: int, *, shared: bool = False, seed: int = 0) -> TrainingBatch:
    """A batch with everything random; `shared`: both views have one condition."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dropped = torch.zeros(2, num_images, dtype=torch.bool)
    dropped[0, 0] = dropped[1, 1] = True
    conditions, condition_noise = (
        gaussian(2, num_images, 3, 32, 32),
        gaussian(2, num_images, 3, 32, 32),
    )
    if shared:
        conditions[1], condition_noise[1], dropped[1] = (
            conditions[0],
            condition_noise[0],
            dropped[0],
        )
    return TrainingBatch(
        latents=gaussian(2, num_images, 4, 8, 8),
        conditions=conditions,
        condition_noise=condition_noise,
        dropped=dropped,
        timesteps=torch.randint(1000, (2, 3, num_images), generator=generator),
        noise=gaussian(2, 3, num_images, 4, 8, 8),
    )


def in_float64(batch: TrainingBatch) -> TrainingBatch:
    return TrainingBatch(
        **{k: v.double() if v.is_floating_point() else v for k, v in asdict(batch).items()}
    )


def cosine_rows(rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True)
    return unit @ unit.T


def naive_losses(
    model: ContraDiff, batch: TrainingBatch, *, recon_passes: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Reconstruction and NT-Xent from six whole passes, with hooks on the UNet's blocks."""
    num_images = batch.latents.shape[1]
    seen = watch_maps(model, model.block)
    errors: list[Tensor] = []
    features: list[Tensor] = []
    for view in range(2):
        pixels = [
            batch.condition_noise[view, i] if batch.dropped[view, i] else batch.conditions[view, i]
            for i in range(num_images)
        ]
        tokens = model.conditioner(torch.stack(pixels))
        for level in range(3):
            timesteps, noise = batch.timesteps[view, level], batch.noise[view, level]
            alpha = model.schedule.alphas_cumprod[timesteps][:, None, None, None]
            noisy = alpha.sqrt() * batch.latents[view] + (1 - alpha).sqrt() * noise
            predicted = model.unet(noisy, timesteps, encoder_hidden_states=tokens).sample
            errors.append((predicted - noise).square().mean())
        maps = seen[-3:]
        ordered: list[Tensor] = []
        for i in range(num_images):
            levels = sorted(range(3), key=lambda k: -int(batch.timesteps[view, k, i]))
            ordered.append(torch.stack([maps[k][i] for k in levels]))
        features.append(model.attention(torch.stack(ordered)))
    similarity = cosine_rows(model.projector(torch.cat(features))) / temperature
    total = similarity.new_zeros(())
    for i in range(2 * num_images):
        others = torch.cat([similarity[i, :i], similarity[i, i + 1 :]])
        total = total + others.logsumexp(0) - similarity[i, (i + num_images) % (2 * num_images)]
    return torch.stack(errors[:recon_passes]).mean(), total / (2 * num_images)


def gradients(model: ContraDiff, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("recon_passes", "shared", "block"),
    [
        (1, True, "mid"),
        (1, False, "mid"),
        (4, False, "mid"),
        (6, True, "mid"),
        (1, False, "up.1"),
        (1, True, "mid+up.1"),
    ],
)
def test_loss_equals_six_whole_passes(
    build_tiny: Build, recon_passes: int, shared: bool, block: str
):
    """And its gradient, which reaches all trainable weights."""
    model = build_tiny(head={"block": block}).train()
    batch = draw_batch(3, shared=shared)
    if block != "mid":  # two more blocks round more: float32 would need a bound 25 times as wide
        model, batch = model.double(), in_float64(batch)
    loss = loss_params(recon_passes=recon_passes)
    losses = model(batch, loss=loss, shared_condition=shared)
    ours = gradients(model, losses["loss"])
    reconstruction, contrastive = naive_losses(
        model, batch, recon_passes=recon_passes, temperature=0.2
    )
    for name, value in (("reconstruction", reconstruction), ("contrastive", contrastive)):
        torch.testing.assert_close(losses[name].to(value), value, rtol=1e-5, atol=1e-6)
    expected = gradients(model, reconstruction + 0.3 * contrastive)
    assert ours.keys() == expected.keys()
    assert ours.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, {}),
        ({"recon_passes": 4, "min_snr_gamma": 5.0}, {"self_conditioning": True}),
        ({"lambda": 0.0, "recon_passes": 2}, {}),
        ({}, {"block": "mid+up.1", "self_conditioning": True}),
    ],
)
@pytest.mark.parametrize("decode_batch_size", [1, 2, 3])
def test_decoding_in_parts_is_the_same_training_step(
    build_tiny: Build, changes: dict[str, Any], head: dict[str, Any], decode_batch_size: int
):
    """Whether or not the parts divide the draws; scaled as accumulation does.

    To float32's rounding, in which Eq. 3 is taken whatever the model's precision.
    """
    model, batch = build_tiny(head=head).double().train(), in_float64(draw_batch(5))
    _freeze_head_without_contrast(model, changes.get("lambda", 0.3))
    whole = model(batch, loss=loss_params(**changes), shared_condition=False)
    expected = gradients(model, whole["loss"] / 3)
    rows: list[int] = []
    model.unet.up_blocks[-1].register_forward_hook(lambda *args: rows.append(len(args[2])))
    parts = model(
        batch,
        loss=loss_params(**changes),
        shared_condition=False,
        decode_batch_size=decode_batch_size,
    )
    ours = gradients(model, parts["loss"] / 3)
    assert sum(rows) == 5 * changes.get("recon_passes", 1)
    assert max(rows) == decode_batch_size
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=0)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("recon_passes", [1, 4])
def test_without_contrast_only_reconstruction_of_the_same_draws_is_left(
    build_tiny: Build, recon_passes: int
):
    """No block runs for a map that nobody reads."""
    model, batch = build_tiny(head={"block": "mid+up.1"}).train(), draw_batch(3)

    def fail(*_: object) -> None:
        raise AssertionError

    both = model(batch, loss=loss_params(recon_passes=recon_passes), shared_condition=False)
    model.attention.register_forward_hook(fail)
    model.projector.register_forward_hook(fail)
    rows: list[int] = []
    for block in (model.unet.mid_block, *model.unet.up_blocks):
        block.register_forward_hook(lambda *args: rows.append(len(args[2])))
    loss = loss_params(recon_passes=recon_passes, **{"lambda": 0.0})
    alone = model(batch, loss=loss, shared_condition=False)
    assert alone.keys() == {"loss", "reconstruction"}
    assert torch.equal(alone["loss"], alone["reconstruction"])
    torch.testing.assert_close(alone["loss"], both["reconstruction"], rtol=1e-5, atol=1e-6)
    assert rows == [3 * recon_passes] * 4


@pytest.mark.parametrize(("weight", "encoded"), [(0.3, 6), (0.0, 3)])
def test_no_condition_is_encoded_for_a_view_that_is_not_computed(
    build_tiny: Build, weight: float, encoded: int
):
    model, rows = build_tiny().train(), []
    model.conditioner.register_forward_hook(lambda *args: rows.append(len(args[2])))
    model(draw_batch(3), loss=loss_params(**{"lambda": weight}), shared_condition=False)
    assert rows == [encoded]


@pytest.mark.parametrize("block", ["mid", "up.1", "mid+up.1"])
def test_no_block_sees_a_draw_twice(build_tiny: Build, block: str):
    model, rows = build_tiny(head={"block": block}).train(), {}
    for index, module in enumerate(model.unet.up_blocks):
        module.register_forward_hook(
            lambda *args, index=index: rows.setdefault(index, []).append(len(args[2]))
        )
    model(draw_batch(3), loss=loss_params(), shared_condition=False)
    early = [3] if block == "mid" else [18]
    assert rows == {0: early, 1: early, 2: [3]}


@pytest.mark.parametrize("recon_passes", [1, 4])
def test_min_snr_weighs_each_sample_by_its_timestep(build_tiny: Build, recon_passes: int):
    model, batch = build_tiny().train(), draw_batch(3)
    loss = loss_params(recon_passes=recon_passes, min_snr_gamma=2.0)
    ours = model(batch, loss=loss, shared_condition=False)["reconstruction"]
    expected = torch.zeros(())
    draws = [(view, level) for view in range(2) for level in range(3)][:recon_passes]
    for view, level in draws:
        for i in range(3):
            timestep, noise = batch.timesteps[view, level, i], batch.noise[view, level, i]
            alpha = model.schedule.alphas_cumprod[timestep]
            noisy = alpha.sqrt() * batch.latents[view, i] + (1 - alpha).sqrt() * noise
            pixels = batch.condition_noise if batch.dropped[view, i] else batch.conditions
            tokens = model.conditioner(pixels[view, i][None])
            predicted = model.unet(noisy[None], timestep, encoder_hidden_states=tokens).sample[0]
            ratio = alpha / (1 - alpha)
            weight = min(float(ratio), 2.0) / ratio
            expected = expected + weight * (predicted - noise).square().mean()
    torch.testing.assert_close(ours, expected / (3 * recon_passes), rtol=1e-5, atol=1e-6)


def test_self_conditioning_starts_as_nothing_and_feeds_the_up_blocks_alone(build_tiny: Build):
    model, plain = build_tiny(head={"self_conditioning": True}), build_tiny()
    assert model.self_condition is not None
    linear = model.self_condition.to_time
    assert (linear.in_features, linear.out_features) == (32, 64)  # bottleneck, time embedding
    counts = count_parameters(model, num_vae_parameters=0).modules
    assert counts["self_condition"] == (32 * 64 + 64, 0)
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys

    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randn(2, 16, 16, generator=generator)
    timesteps = torch.tensor([5, 900])
    with torch.no_grad():
        expected = plain.noise_pred(noisy, timesteps, tokens)
        changed = model.noise_pred(noisy, timesteps, tokens)
        maps = [m.encode(noisy, timesteps, tokens).bottleneck for m in (model, plain)]
        pooled = maps[0].mean(dim=(2, 3))
        # written out: the up blocks, and nothing before them, see another time embedding
        emb = plain.unet.time_embedding(plain.unet.time_proj(timesteps))
        replaced = [emb + linear(pooled)]
        for block in plain.unet.up_blocks:
            block.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"temb": replaced[0]}), with_kwargs=True
            )
        written_out = plain.unet(noisy, timesteps, encoder_hidden_states=tokens).sample
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        at_start = model.noise_pred(noisy, timesteps, tokens)
    assert maps[0].equal(maps[1])
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(changed, written_out)
    assert at_start.equal(expected)


def test_self_conditioning_learns_from_the_reconstruction(build_tiny: Build):
    model = build_tiny(head={"self_conditioning": True}).train()
    loss = loss_params(**{"lambda": 0.0})
    losses = model(draw_batch(3), loss=loss, shared_condition=False)
    gradient = gradients(model, losses["loss"])["self_condition.to_time.weight"]
    assert gradient.any()
    assert "self_condition.to_time.weight" in model.trained_state()


@pytest.mark.parametrize("kind", ["dcl_paper", "infonce"])
def test_other_contrastive_losses_are_reached(build_tiny: Build, kind: str):
    model, batch = build_tiny(), draw_batch(3)
    losses = model(batch, loss=loss_params(contrastive=kind), shared_condition=False)
    ntxent = model(batch, loss=loss_params(), shared_condition=False)
    assert torch.equal(losses["reconstruction"], ntxent["reconstruction"])
    assert not torch.isclose(losses["contrastive"], ntxent["contrastive"])


def test_an_optimiser_step_changes_the_trained_parts_alone(build_tiny: Build):
    model = build_tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = set(model.trained_state())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model(draw_batch(3), loss=loss_params(), shared_condition=False)["loss"].backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def test_trained_state_is_exactly_what_training_may_change(build_tiny: Build):
    model = build_tiny()
    state = set(model.trained_state())
    lora = {name for name in state if name.startswith("unet.")}
    attentions = [name for name, _ in model.named_modules() if name.endswith("attn2")]
    assert lora == {
        f"{attention}.to_{target}.lora_{factor}.default.weight"
        for attention in attentions
        for target in "qkv"
        for factor in "AB"
    }
    rest = {
        f"{part}.{name}"
        for part in ("conditioner", "attention", "projector")
        for name in getattr(model, part).state_dict()
    }
    assert state == lora | rest
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert state - trainable == {
        "projector.1.running_mean",
        "projector.1.running_var",
        "projector.1.num_batches_tracked",
    }


def test_trained_state_loads_into_another_model(build_tiny: Build):
    first, second = build_tiny(seed=0), build_tiny(seed=1)
    state = {name: tensor.clone() for name, tensor in first.trained_state().items()}
    assert not torch.equal(second.conditioner.positions, first.conditioner.positions)
    second.load_trained_state(state)
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name


def test_a_trained_state_that_does_not_fit_is_refused(build_tiny: Build):
    model = build_tiny()
    state = model.trained_state()
    name = "attention.to_q.weight"
    for other in (
        {key: value for key, value in state.items() if key != name},
        state | {"attention.extra": torch.zeros(1)},
        state | {name: state[name][:-1]},
    ):
        with pytest.raises(ValueError, match="made with other lora, conditioner or head"):
            model.load_trained_state(other)


def test_training_mode_leaves_the_base_in_evaluation_mode(build_tiny: Build):
    model = build_tiny().train()
    assert model.projector.training
    assert not any(module.training for module in model.unet.modules())
    assert not model.eval().projector.training


@pytest.mark.parametrize("block", ["mid", "up.1", "mid+up.1"])
@torch.no_grad()
def test_level_maps_are_those_of_single_passes(build_tiny: Build, block: str):
    """Noisiest first, whatever the order in which the timesteps are listed."""
    model, batch = build_tiny(head={"block": block}), draw_batch(2)
    tokens, latents, noise = (
        model.encode_condition(batch.conditions[0]),
        batch.latents[0],
        batch.noise[0],
    )
    maps = model.level_maps(latents, tokens, timesteps=[101, 401, 201], noise=noise)
    seen = watch_maps(model, block)
    for level, timestep in enumerate((401, 201, 101)):
        alpha = model.schedule.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise[level]
        model.unet(noisy, timestep, encoder_hidden_states=tokens)
    torch.testing.assert_close(maps, torch.stack(seen, dim=1), rtol=1e-4, atol=1e-5)


def _freeze_head_without_contrast(model: ContraDiff, weight: float) -> None:
    """As `pretrain` does, since DDP refuses parameters that get no gradient."""
    if weight == 0:
        model.attention.requires_grad_(requires_grad=False)
        model.projector.requires_grad_(requires_grad=False)


def _train_one_process(
    rank: int, folder: Path, base: Path, weight: float, decode_batch_size: int
) -> None:
    """One of two processes: its images of the batch, DDP's gradient, BatchNorm's statistics."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model = load_checkpoint(folder / "checkpoint", base=base).train()
    _freeze_head_without_contrast(model, weight)
    wrapped = DistributedDataParallel(model)
    whole = load_file(folder / "batch.safetensors")
    # Images are the second axis, after the views, but for the draws' levels in between.
    batch = TrainingBatch(
        **{
            name: tensor.chunk(2, dim=2 if name in ("timesteps", "noise") else 1)[rank].contiguous()
            for name, tensor in whole.items()
        }
    )
    loss = loss_params(**{"recon_passes": 2, "lambda": weight})
    losses = wrapped(batch, loss=loss, shared_condition=False, decode_batch_size=decode_batch_size)
    losses["loss"].backward()
    state = {f"gradient.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    state |= {f"buffer.{n}": tensor for n, tensor in model.projector.named_buffers()}
    state |= {f"loss.{n}": value.detach().clone() for n, value in losses.items()}
    save_file(state, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("weight", "head", "decode_batch_size"),
    [
        (0.3, {}, 0),
        (0.3, {"block": "mid+up.1", "self_conditioning": True}, 4),
        (0.0, {"self_conditioning": True}, 0),
    ],
)
def test_two_processes_have_the_gradient_of_one(
    build_tiny: Build,
    tiny_base: Path,
    tiny_params: dict[str, Any],
    tmp_path: Path,
    *,
    weight: float,
    head: dict[str, Any],
    decode_batch_size: int,
):
    """The whole step's, to 1e-6 of its length in float32."""
    model, batch = build_tiny(head=head), draw_batch(6)
    _freeze_head_without_contrast(model, weight)
    save_checkpoint(
        tmp_path / "checkpoint",
        model,
        base=tiny_base,
        image_size=32,
        num_steps=0,
        counts=count_parameters(model, num_vae_parameters=0),
        params=tiny_params | {"head": tiny_params["head"] | head},
    )
    save_file(asdict(batch), tmp_path / "batch.safetensors")
    mp.spawn(_train_one_process, (tmp_path, tiny_base, weight, decode_batch_size), nprocs=2)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]

    loss = loss_params(**{"recon_passes": 2, "lambda": weight})
    losses = model.train()(batch, loss=loss, shared_condition=False)
    expected = gradients(model, losses["loss"])
    length = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for rank in ranks:
        names = {name.removeprefix("gradient.") for name in rank if name.startswith("gradient.")}
        assert names == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                rank[f"gradient.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name
            )
        differences = [rank[f"gradient.{name}"] - expected[name] for name in expected]
        assert torch.cat([d.flatten() for d in differences]).norm() <= 1e-6 * length
        for name, tensor in model.projector.named_buffers():
            torch.testing.assert_close(rank[f"buffer.{name}"], tensor)
    for name, value in losses.items():
        mean = (ranks[0][f"loss.{name}"] + ranks[1][f"loss.{name}"]) / 2
        assert math.isclose(mean, value.item(), rel_tol=1e-5), name
