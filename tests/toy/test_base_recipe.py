"""Resuming, training with two processes, and the first losses computed by hand."""

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from contradiff.toy import base_recipe
from contradiff.toy.base_recipe import Recipe, captions, train_unet, train_vae
from tests.processes import in_two_processes


def make_images() -> Tensor:
    """Make 24 images of 16 x 16 pixels: a random disc on a background of a random colour."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    place = torch.rand(24, 3, 1, 1, generator=generator)
    place *= torch.tensor([10.0, 10.0, 4.0])[:, None, None]
    inside = (x - place[:, :1] - 3).hypot(y - place[:, 1:2] - 3) < place[:, 2:] + 2
    colours = torch.rand(2, 24, 3, 1, 1, generator=generator)
    return (torch.where(inside, colours[0], colours[1]) * 255).to(torch.uint8)


images = pytest.fixture(make_images, scope="module")


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base_recipe, "CHECKPOINT_EVERY", 2)


def call(trainer: Callable[..., Any], *inputs: Any, folder: Path, **changes: Any) -> Any:
    """Train with a short recipe. `changes` may have its fields, `on_step` and `accelerator`."""
    on_step = changes.pop("on_step", lambda *_: None)
    accelerator = changes.pop("accelerator", None) or Accelerator(cpu=True)
    recipe = Recipe(**({"num_steps": 5, "batch_size": 4} | changes))
    return trainer(*inputs, accelerator, folder, on_step, recipe=recipe)


def first_values(trainer: Callable[..., Any], *inputs: Any, folder: Path) -> Mapping[str, float]:
    """Train one step with seed 3; return the reported values."""
    seen: list[Mapping[str, float]] = []
    changes: dict[str, Any] = {"on_step": lambda _, row: seen.append(row)}
    call(trainer, *inputs, folder=folder, seed=3, num_steps=1, **changes)
    return seen[0]


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_autoencoder_learns_and_has_unit_latents(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(base_recipe, "CHECKPOINT_EVERY", 1000)  # 40 would take half the time
    losses: list[float] = []
    vae = call(
        train_vae,
        images,
        folder=tmp_path,
        num_steps=80,
        lr=5e-3,  # 80 of the 200 warm-up steps reach about a third of this
        on_step=lambda _, row: losses.append(row["l1"]),
    )
    assert sum(losses[-10:]) < 0.93 * sum(losses[:10])
    with torch.no_grad():
        means = vae.encode(images.float() / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    assert 0.8 < means.std() < 1.25  # not exactly 1, as other random images were used


def test_autoencoders_first_losses_are_those_written_out(images: Tensor, tmp_path: Path):
    """Step 0, seed 3: every random number drawn again in the documented order."""
    found = first_values(train_vae, images, folder=tmp_path)
    torch.manual_seed(3)
    vae = base_recipe.build_vae()
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    index = torch.randint(24, (4,), generator=generator)
    mirrored = torch.rand(4, 1, 1, 1, generator=generator) < 0.5
    noise = torch.randn(4, 4, 4, 4, generator=generator)
    error = divergence = 0.0
    with torch.no_grad():
        for i, flipped, eps in zip(index, mirrored.flatten(), noise, strict=True):
            image = images[i].float() / 127.5 - 1
            image = image.flip(2) if flipped else image
            mean, log_variance = vae.quant_conv(vae.encoder(image[None])).chunk(2, dim=1)
            decoded = vae.decode(mean + (log_variance / 2).exp() * eps).sample[0]
            error += float((decoded - image).abs().mean()) / 4
            terms = mean.square() + log_variance.exp() - 1 - log_variance
            divergence += float(terms.sum()) / 2 / (3 * 16 * 16) / 4
    assert found["l1"] == pytest.approx(error, rel=1e-4)
    assert found["kl"] == pytest.approx(divergence, rel=1e-4)


def test_killed_trainings_resume_to_the_same_weights(images: Tensor, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def kill(done: int, _: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    vae = call(train_vae, images, folder=whole)
    unet = call(train_unet, images, vae, folder=whole)
    for trainer, inputs, model in ((train_vae, [images], vae), (train_unet, [images, vae], unet)):
        with pytest.raises(KeyboardInterrupt):
            call(trainer, *inputs, folder=killed, on_step=kill)
        assert equal(call(trainer, *inputs, folder=killed), model)
        assert not equal(call(trainer, *inputs, folder=tmp_path, seed=1), model)


def test_denoisers_first_loss_is_the_weighted_error_written_out(images: Tensor, tmp_path: Path):
    """Step 0, seed 3: every random number drawn again in the documented order."""
    vae = call(train_vae, images, folder=tmp_path, num_steps=1)
    found = first_values(train_unet, images, vae, folder=tmp_path)
    torch.manual_seed(4)
    unet = base_recipe.build_unet()
    alphas = base_recipe.build_scheduler().alphas_cumprod
    clean: list[Tensor] = []
    both = [version.float() / 127.5 - 1 for version in (images, images.flip(-1))]
    generator = torch.Generator().manual_seed(3)
    for version in both:
        with torch.no_grad():
            posterior = vae.encode(version).latent_dist
        noise = torch.randn(24, 4, 4, 4, generator=generator)
        clean.append((posterior.mean + posterior.std * noise) * vae.config.scaling_factor)
    generator.manual_seed(3 * 1_000_003)
    index = torch.randint(48, (4,), generator=generator)
    noise = torch.randn(4, 4, 4, 4, generator=generator)
    timesteps = torch.randint(1000, (4,), generator=generator)
    kept = torch.rand(4, generator=generator) >= 0.5
    assert 0 < kept.sum() < 4
    total = error = 0.0
    for number, eps, t, has_caption in zip(index, noise, timesteps, kept, strict=True):
        noisy = alphas[t].sqrt() * torch.cat(clean)[number] + (1 - alphas[t]).sqrt() * eps
        tokens = captions(torch.cat(both)[number][None]) if has_caption else torch.zeros(1, 4, 64)
        with torch.no_grad():
            predicted = unet(noisy[None], t, encoder_hidden_states=tokens).sample
        squared = float((predicted[0] - eps).square().mean())
        ratio = float(alphas[t] / (1 - alphas[t]))
        total += min(ratio, 5.0) / ratio * squared / 4
        error += squared / 4
    assert found["loss"] == pytest.approx(total, rel=1e-4)
    assert found["error"] == pytest.approx(error, rel=1e-4)


def test_captions_know_colours_and_no_shapes():
    flat = torch.tensor([0.5, -0.25, 1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    checks = flat + torch.tensor([[0.3, -0.3], [-0.3, 0.3]]).repeat(16, 16)
    torch.testing.assert_close(captions(flat), captions(checks), atol=1e-5, rtol=0)
    assert not torch.allclose(captions(flat), captions(flat.flip(1)))


def _train_both(folder: Path, **changes: Any) -> dict[str, Tensor]:
    vae = call(train_vae, make_images(), folder=folder, num_steps=2, **changes)
    unet = call(train_unet, make_images(), vae, folder=folder, num_steps=2, **changes)
    states = {"vae": vae.state_dict(), "unet": unet.state_dict()}
    return {f"{kind}.{k}": v.contiguous() for kind in states for k, v in states[kind].items()}


def _train_in_two(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    save_file(_train_both(folder / "two"), folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow  # `make base` is rare; two processes' gradients are compared in test_objective
def test_two_processes_train_the_model_of_one(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    in_two_processes(_train_in_two, tmp_path, port)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, tensor in _train_both(tmp_path / "one").items():
        assert torch.equal(first[name], second[name])
        # Adam's first steps have the size of the learning rate, even for tiny gradients. The sign
        # of a gradient near zero depends on rounding.
        assert torch.isclose(first[name], tensor, atol=2e-5).float().mean() > 0.98, name


def test_batch_that_does_not_divide_is_refused(images: Tensor, tmp_path: Path):
    three = SimpleNamespace(num_processes=3, process_index=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="3 processes cannot share 4 images equally"):
        call(train_vae, images, folder=tmp_path, accelerator=three)
