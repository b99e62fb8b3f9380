"""The loss equals that of six complete UNet passes; two processes train like one."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contradiff.method.checkpoint import load_checkpoint
from contradiff.method.model import ContraDiffModel
from contradiff.method.objective import TrainingBatch, TrainingStep
from contradiff.training.pretraining import set_up
from tests.method.batches import draw_batch, loss_params, watch_maps
from tests.processes import in_two_processes

Build = Callable[..., ContraDiffModel]


def losses_of(
    model: ContraDiffModel, batch: TrainingBatch, *, decode_batch_size: int = 0, **changes: Any
) -> dict[str, Tensor]:
    """Compute the losses of a step with changed loss parameters."""
    step = TrainingStep(model, loss=loss_params(**changes), decode_batch_size=decode_batch_size)
    return step(batch)


def in_float64(batch: TrainingBatch) -> TrainingBatch:
    fields = asdict(batch).items()
    return TrainingBatch(**{k: v.double() if v.is_floating_point() else v for k, v in fields})


def naive_losses(
    model: ContraDiffModel, batch: TrainingBatch, *, recon_passes: int, gamma: float
) -> tuple[Tensor, Tensor]:
    """Compute both losses (min-SNR weights; NT-Xent, temperature 0.2) from six complete passes."""
    num_images = batch.latents.shape[1]
    seen = watch_maps(model, model.block)
    errors: list[Tensor] = []
    features: list[Tensor] = []
    for view in range(2):
        for level in range(3):
            shown = {1: 0, 2: view, 3: 0 if 3 * view + level < recon_passes else view + 1}
            of = shown[len(batch.conditions)]
            pixels = [
                (batch.condition_noise if batch.dropped[of, i] else batch.conditions)[of, i]
                for i in range(num_images)
            ]
            tokens = model.conditioner(torch.stack(pixels))
            timesteps, noise = batch.timesteps[view, level], batch.noise[view, level]
            alpha = model.schedule.alphas_cumprod[timesteps][:, None, None, None]
            noisy = alpha.sqrt() * batch.latents[view] + (1 - alpha).sqrt() * noise
            predicted = model.unet(noisy, timesteps, encoder_hidden_states=tokens).sample
            ratio = alpha / (1 - alpha)
            weight = ratio.clamp(max=gamma) / ratio if gamma else 1.0
            errors.append((weight * (predicted - noise).square()).mean())
        maps = seen[-3:]
        ordered: list[Tensor] = []
        for i in range(num_images):
            levels = sorted(range(3), key=lambda k: -int(batch.timesteps[view, k, i]))
            ordered.append(torch.stack([maps[k][i] for k in levels]))
        features.append(model.attention(torch.stack(ordered)))
    unit = F.normalize(model.projector(torch.cat(features)), dim=1)
    similarity = unit @ unit.T / 0.2
    total = similarity.new_zeros(())
    for i in range(2 * num_images):
        others = torch.cat([similarity[i, :i], similarity[i, i + 1 :]])
        total = total + others.logsumexp(0) - similarity[i, (i + num_images) % (2 * num_images)]
    return torch.stack(errors[:recon_passes]).mean(), total / (2 * num_images)


def gradients(model: ContraDiffModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("recon_passes", "gamma", "cond_views", "block"),
    [
        (1, 0.0, 1, "mid"),
        (1, 2.0, 2, "mid"),
        (4, 2.0, 2, "mid"),
        (2, 0.0, 3, "mid"),
        (6, 0.0, 1, "mid"),
        (1, 0.0, 2, "up.1"),
        (1, 0.0, 1, "mid+up.1"),
    ],
)
def test_loss_equals_six_whole_passes(
    build_tiny: Build, *, recon_passes: int, gamma: float, cond_views: int, block: str
):
    """So does the gradient, which reaches all trainable weights. Passes are in float64."""
    model = build_tiny(head={"block": block}).double().train()
    batch = in_float64(draw_batch(3, cond_views=cond_views))
    losses = losses_of(model, batch, recon_passes=recon_passes, min_snr_gamma=gamma)
    ours = gradients(model, losses["loss"])
    reconstruction, contrastive = naive_losses(model, batch, recon_passes=recon_passes, gamma=gamma)
    for name, value in (("reconstruction", reconstruction), ("contrastive", contrastive)):
        torch.testing.assert_close(losses[name].to(value), value, rtol=1e-5, atol=1e-6)
    expected = gradients(model, reconstruction + 0.3 * contrastive)
    assert ours.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-6)


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
    """The tolerance is float32's rounding. Parts may be unequal; 3 is as in accumulation."""
    model, batch = build_tiny(head=head).double().train(), in_float64(draw_batch(5))
    set_up(model, loss=loss_params(**changes), gradient_checkpointing="none", precision="fp32")
    whole = losses_of(model, batch, **changes)
    expected = gradients(model, whole["loss"] / 3)
    rows: list[int] = []
    model.unet.up_blocks[-1].register_forward_hook(lambda *args: rows.append(len(args[2])))
    parts = losses_of(model, batch, decode_batch_size=decode_batch_size, **changes)
    ours = gradients(model, parts["loss"] / 3)
    assert sum(rows) == 5 * changes.get("recon_passes", 1)
    assert max(rows) == decode_batch_size
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=0)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", ["none", "down.0", "all"])
def test_decoding_in_parts_is_the_same_under_autocast(build_tiny: Build, checkpointing: str):
    """The tolerance is bfloat16's rounding. The parts' gradients are summed in float32."""
    model, batch = build_tiny().train(), draw_batch(5)
    set_up(model, loss=loss_params(), gradient_checkpointing=checkpointing, precision="bf16")
    found: list[dict[str, Tensor]] = []
    for decode_batch_size in (0, 3):
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(model, batch, decode_batch_size=decode_batch_size, recon_passes=4)
        found.append(gradients(model, losses["loss"]))
    whole, parts = found
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert gradient.dtype == parts[name].dtype == torch.float32
        assert (parts[name] - gradient).norm() <= 0.005 * gradient.norm(), name


@pytest.mark.parametrize("recon_passes", [1, 4])
@pytest.mark.parametrize(("block", "num_early"), [("mid", 0), ("up.1", 2), ("mid+up.1", 2)])
def test_nothing_is_computed_twice_or_for_nobody(
    build_tiny: Build, block: str, num_early: int, recon_passes: int
):
    """All draws pass the blocks whose maps are read. Without contrast, no maps are read."""
    model = build_tiny(head={"block": block, "self_conditioning": True}).train()
    batch, unet, rows = draw_batch(3), model.unet, []
    modules = (model.conditioner, unet.mid_block, *unet.up_blocks, model.attention, model.projector)
    for module in modules:
        module.register_forward_hook(lambda *args: rows.append(len(args[2])))
    both = losses_of(model, batch, recon_passes=recon_passes)
    late = [3 * recon_passes] * (3 - num_early)
    assert rows == [6, 18, *[18] * num_early, *late, 6, 6]
    rows.clear()
    alone = losses_of(model, batch, recon_passes=recon_passes, **{"lambda": 0.0})
    assert rows == [3 * math.ceil(recon_passes / 3), *[3 * recon_passes] * 4]
    assert alone.keys() == {"loss", "reconstruction"}
    assert torch.equal(alone["loss"], alone["reconstruction"])
    torch.testing.assert_close(alone["loss"], both["reconstruction"], rtol=1e-5, atol=1e-6)
    assert gradients(model, alone["loss"])["self_condition.to_time.weight"].any()


@pytest.mark.parametrize("kind", ["dcl_paper", "infonce"])
def test_other_contrastive_losses_are_reached(build_tiny: Build, kind: str):
    model, batch = build_tiny(), draw_batch(3)
    losses = losses_of(model, batch, contrastive=kind)
    ntxent = losses_of(model, batch)
    assert torch.equal(losses["reconstruction"], ntxent["reconstruction"])
    assert not torch.isclose(losses["contrastive"], ntxent["contrastive"])


def _train_one_process(
    rank: int, folder: Path, base: Path, weight: float, decode_batch_size: int
) -> None:
    """Train one of two processes on its images; save DDP's gradient and BatchNorm's statistics."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    model = load_checkpoint(folder / "checkpoint", base=base).double().train()
    loss = loss_params(**{"recon_passes": 2, "lambda": weight})
    set_up(model, loss=loss, gradient_checkpointing="none", precision="fp32")
    whole = load_file(folder / "batch.safetensors")
    # The axis of images is 1, after the views, or 2 if there are also levels.
    axes = {name: 2 if name in ("timesteps", "noise") else 1 for name in whole}
    mine = {n: t.chunk(2, dim=axes[n])[rank].contiguous() for n, t in whole.items()}
    batch = TrainingBatch(**mine)
    step = TrainingStep(model, loss=loss, decode_batch_size=decode_batch_size)
    wrapped = DistributedDataParallel(step)  # the name keeps it alive during the backward pass
    losses = wrapped(batch)
    losses["loss"].backward()
    state = {f"gradient.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    state |= {f"buffer.{n}": tensor for n, tensor in model.projector.named_buffers()}
    state |= {f"loss.{n}": value.detach().clone() for n, value in losses.items()}
    save_file(state, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("weight", "head", "decode_batch_size"),
    [
        pytest.param(0.3, {}, 0, marks=pytest.mark.slow),  # the other two have all that this has
        (0.3, {"block": "mid+up.1", "self_conditioning": True}, 4),
        (0.0, {"self_conditioning": True}, 0),
    ],
)
def test_two_processes_have_the_gradient_of_one(
    build_tiny: Build,
    tiny_base: Path,
    tiny_params: dict[str, Any],
    save_tiny: Callable[..., None],
    tmp_path: Path,
    *,
    weight: float,
    head: dict[str, Any],
    decode_batch_size: int,
):
    """Use float64, because float32 sums in another order would differ by rounding."""
    model, batch = build_tiny(head=head), in_float64(draw_batch(6))
    changes = {"recon_passes": 2, "lambda": weight}
    set_up(model, loss=loss_params(**changes), gradient_checkpointing="none", precision="fp32")
    save_tiny(tmp_path / "checkpoint", model, head=tiny_params["head"] | head)
    save_file(asdict(batch), tmp_path / "batch.safetensors")
    in_two_processes(_train_one_process, tmp_path, tiny_base, weight, decode_batch_size)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]

    losses = losses_of(model.double().train(), batch, **changes)
    expected = gradients(model, losses["loss"])
    length = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for rank in ranks:
        ours = {n.removeprefix("gradient."): t for n, t in rank.items() if "gradient." in n}
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        differences = [ours[name] - expected[name] for name in expected]
        assert torch.cat([d.flatten() for d in differences]).norm() <= 1e-6 * length
        for name, tensor in model.projector.named_buffers():
            torch.testing.assert_close(rank[f"buffer.{name}"], tensor)
    for name, value in losses.items():
        mean = (ranks[0][f"loss.{name}"] + ranks[1][f"loss.{name}"]) / 2
        assert math.isclose(mean, value.item(), rel_tol=1e-5), name
