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
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contradiff.backbone import LoraParams, NoiseSchedule
from contradiff.checkpoint import load_checkpoint, save_checkpoint
from contradiff.conditioner import ConditionerParams
from contradiff.features import HeadParams
from contradiff.losses import LossParams
from contradiff.model import ContraDiff, TrainingBatch, count_parameters

Build = Callable[..., ContraDiff]


def loss_params(**changes: Any) -> LossParams:
    return LossParams.model_validate(
        {
            "lambda": 0.3,
            "contrastive": "ntxent",
            "temperature": 0.2,
            "latent_views": "two",
            "recon_passes": 1,
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


def cosine_rows(rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True)
    return unit @ unit.T


def naive_losses(
    model: ContraDiff, batch: TrainingBatch, *, recon_passes: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Reconstruction and NT-Xent from six whole passes, with a hook on the UNet's mid block."""
    num_images = batch.latents.shape[1]
    seen: list[Tensor] = []
    hook = model.unet.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
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
    hook.remove()
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


@pytest.mark.parametrize(("recon_passes", "shared"), [(1, True), (1, False), (4, False), (6, True)])
def test_loss_equals_six_whole_passes(build_tiny: Build, recon_passes: int, shared: bool):
    """And its gradient, by all trainable weights."""
    model, batch = build_tiny().train(), draw_batch(3, shared=shared)
    loss = loss_params(recon_passes=recon_passes)
    losses = model(batch, loss=loss, shared_condition=shared)
    ours = gradients(model, losses["loss"])
    reconstruction, contrastive = naive_losses(
        model, batch, recon_passes=recon_passes, temperature=0.2
    )
    torch.testing.assert_close(losses["reconstruction"], reconstruction, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["contrastive"], contrastive, rtol=1e-5, atol=1e-6)
    expected = gradients(model, reconstruction + 0.3 * contrastive)
    assert ours.keys() == expected.keys()
    assert ours.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("recon_passes", [1, 4])
def test_without_contrast_only_reconstruction_of_the_same_draws_is_left(
    build_tiny: Build, recon_passes: int
):
    model, batch = build_tiny().train(), draw_batch(3)

    def fail(*_: object) -> None:
        raise AssertionError

    both = model(batch, loss=loss_params(recon_passes=recon_passes), shared_condition=False)
    model.attention.register_forward_hook(fail)
    model.projector.register_forward_hook(fail)
    rows: list[int] = []
    model.unet.mid_block.register_forward_hook(lambda *args: rows.append(len(args[2])))
    loss = loss_params(recon_passes=recon_passes, **{"lambda": 0.0})
    alone = model(batch, loss=loss, shared_condition=False)
    assert alone.keys() == {"loss", "reconstruction"}
    assert torch.equal(alone["loss"], alone["reconstruction"])
    torch.testing.assert_close(alone["loss"], both["reconstruction"], rtol=1e-5, atol=1e-6)
    assert rows == [3 * recon_passes]


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


@torch.no_grad()
def test_level_maps_are_those_of_single_passes(build_tiny: Build):
    """Noisiest first, whatever the order in which the timesteps are listed."""
    model, batch = build_tiny(), draw_batch(2)
    tokens, latents, noise = (
        model.encode_condition(batch.conditions[0]),
        batch.latents[0],
        batch.noise[0],
    )
    maps = model.level_maps(latents, tokens, timesteps=[101, 401, 201], noise=noise)
    seen: list[Tensor] = []
    model.unet.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    for level, timestep in enumerate((401, 201, 101)):
        alpha = model.schedule.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise[level]
        model.unet(noisy, timestep, encoder_hidden_states=tokens)
    torch.testing.assert_close(maps, torch.stack(seen, dim=1), rtol=1e-4, atol=1e-5)


def test_parameter_counts_at_the_papers_scale():
    """68.1M trainable with the linear classifier's 1,025,000 (paper: 68M)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=768,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        ).requires_grad_(requires_grad=False)
        model = ContraDiff(
            unet,
            NoiseSchedule(torch.empty(1000)),
            lora=LoraParams(
                rank=16, alpha=16.0, targets=["attn2.to_q", "attn2.to_k", "attn2.to_v"]
            ),
            conditioner=ConditionerParams(
                patch_size=16, width=512, depth=12, num_heads=8, drop=0.1, cond_view="same"
            ),
            head=HeadParams(
                width=1024, num_heads=8, mlp_ratio=4, projector_width=1024, projector_out=128
            ),
            image_size=256,
        )
    counts = count_parameters(model, num_vae_parameters=83_653_863)
    assert counts.trainable == 68_104_936 - 1_025_000
    assert counts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.frozen == 943_174_827
    assert counts.to_json()["modules"] == {
        "unet": [0, 859_520_964],
        "vae": [0, 83_653_863],
        "lora": [1_191_936, 0],
        "conditioner": [38_729_984, 0],
        "attention": [25_976_320, 0],
        "projector": [1_181_696, 0],
    }


def _train_one_process(rank: int, folder: Path, base: Path) -> None:
    """One of two processes: its images of the batch, DDP's gradient, BatchNorm's statistics."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model = load_checkpoint(folder / "checkpoint", base=base).train()
    wrapped = DistributedDataParallel(model)
    whole = load_file(folder / "batch.safetensors")
    # Images are the second axis, after the views, but for the draws' levels in between.
    batch = TrainingBatch(
        **{
            name: tensor.chunk(2, dim=2 if name in ("timesteps", "noise") else 1)[rank].contiguous()
            for name, tensor in whole.items()
        }
    )
    losses = wrapped(batch, loss=loss_params(recon_passes=2), shared_condition=False)
    losses["loss"].backward()
    state = {f"gradient.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    state |= {f"buffer.{n}": tensor for n, tensor in model.projector.named_buffers()}
    state |= {f"loss.{n}": value.detach() for n, value in losses.items()}
    save_file(state, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(
    build_tiny: Build, tiny_base: Path, tiny_params: dict[str, Any], tmp_path: Path
):
    model, batch = build_tiny(), draw_batch(6)
    save_checkpoint(
        tmp_path / "checkpoint",
        model,
        base=tiny_base,
        image_size=32,
        num_steps=0,
        counts=count_parameters(model, num_vae_parameters=0),
        params=tiny_params,
    )
    save_file(asdict(batch), tmp_path / "batch.safetensors")
    mp.spawn(_train_one_process, (tmp_path, tiny_base), nprocs=2)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]

    losses = model.train()(batch, loss=loss_params(recon_passes=2), shared_condition=False)
    expected = gradients(model, losses["loss"])
    for rank in ranks:
        names = {name.removeprefix("gradient.") for name in rank if name.startswith("gradient.")}
        assert names == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                rank[f"gradient.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name
            )
        for name, tensor in model.projector.named_buffers():
            torch.testing.assert_close(rank[f"buffer.{name}"], tensor)
    for name, value in losses.items():
        mean = (ranks[0][f"loss.{name}"] + ranks[1][f"loss.{name}"]) / 2
        assert math.isclose(mean, value.item(), rel_tol=1e-5), name
