"""Resuming, shares of a batch, and the loss written out."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from contradiff.toy import base_recipe as base_training
from contradiff.toy.base_recipe import build_scheduler, captions, train_unet, train_vae


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture(scope="module")
def images() -> Tensor:
    """24 discs of random colour, place and size, on random plain grounds, at 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    place = (
        torch.rand(24, 3, 1, 1, generator=generator)
        * torch.tensor([10.0, 10.0, 4.0])[:, None, None]
    )
    inside = (x - place[:, :1] - 3).hypot(y - place[:, 1:2] - 3) < place[:, 2:] + 2
    colours = torch.rand(2, 24, 3, 1, 1, generator=generator)
    return (torch.where(inside, colours[0], colours[1]) * 255).to(torch.uint8)


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base_training, "CHECKPOINT_EVERY", 2)


def vae_of(images: Tensor, folder: Path, **changes: Any):
    settings = {
        "num_steps": 5,
        "batch_size": 4,
        "lr": 2e-3,
        "kl_weight": 1e-4,
        "seed": 0,
        "accelerator": Accelerator(cpu=True),
        "work_dir": folder,
        "on_step": lambda *_: None,
    }
    return train_vae(images, **(settings | changes))


def unet_of(images: Tensor, vae: Any, folder: Path, **changes: Any):
    settings = {
        "num_steps": 5,
        "batch_size": 4,
        "lr": 1e-3,
        "caption_drop": 0.5,
        "seed": 0,
        "accelerator": Accelerator(cpu=True),
        "work_dir": folder,
        "on_step": lambda *_: None,
    }
    return train_unet(images, vae, **(settings | changes))


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, others = first.state_dict(), second.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[k], others[k]) for k in ours)


def kill_after(step: int):
    def report(done: int, _: Mapping[str, float]) -> None:
        if done == step:
            raise Killed

    return report


def test_autoencoder_learns_and_has_unit_latents(images: Tensor, tmp_path: Path):
    losses: list[float] = []
    vae = vae_of(
        images,
        tmp_path,
        num_steps=80,
        batch_size=8,
        lr=5e-3,  # a third of it is reached: the warm-up is 200 steps
        on_step=lambda _, parts: losses.append(parts["l1"]),
    )
    assert sum(losses[-10:]) < 0.93 * sum(losses[:10])
    with torch.no_grad():
        means = vae.encode(images.float() / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    assert 0.8 < means.std() < 1.25  # of other draws and mirrored images: not exactly 1


def test_autoencoders_first_losses_are_those_written_out(images: Tensor, tmp_path: Path):
    """Step 0, seed 3: every random number drawn again in the documented order."""
    seen: list[Mapping[str, float]] = []
    vae_of(images, tmp_path, seed=3, num_steps=1, on_step=lambda _, parts: seen.append(parts))
    torch.manual_seed(3)
    vae = base_training.build_vae()
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
    assert seen[0]["l1"] == pytest.approx(error, rel=1e-4)
    assert seen[0]["kl"] == pytest.approx(divergence, rel=1e-4)


def test_killed_trainings_resume_to_the_same_weights(images: Tensor, tmp_path: Path):
    vae = vae_of(images, tmp_path / "whole")
    with pytest.raises(Killed):
        vae_of(images, tmp_path / "killed", on_step=kill_after(3))
    assert equal(vae_of(images, tmp_path / "killed"), vae)

    unet = unet_of(images, vae, tmp_path / "whole")
    with pytest.raises(Killed):
        unet_of(images, vae, tmp_path / "killed", on_step=kill_after(3))
    assert equal(unet_of(images, vae, tmp_path / "killed"), unet)
    assert not equal(unet_of(images, vae, tmp_path / "other", seed=1), unet)


def test_denoisers_first_loss_is_the_weighted_error_written_out(images: Tensor, tmp_path: Path):
    """Step 0, seed 3, no caption: every random number drawn again in the documented order."""
    vae = vae_of(images, tmp_path / "vae", num_steps=1)
    seen: list[Mapping[str, float]] = []
    unet_of(
        images,
        vae,
        tmp_path,
        seed=3,
        num_steps=1,
        caption_drop=1.0,
        on_step=lambda _, parts: seen.append(parts),
    )
    torch.manual_seed(4)
    unet = base_training.build_unet()
    alphas = build_scheduler().alphas_cumprod
    clean: list[Tensor] = []
    generator = torch.Generator().manual_seed(3)
    for version in (images, images.flip(-1)):
        with torch.no_grad():
            posterior = vae.encode(version.float() / 127.5 - 1).latent_dist
        noise = torch.randn(24, 4, 4, 4, generator=generator)
        clean.append((posterior.mean + posterior.std * noise) * vae.config.scaling_factor)
    generator.manual_seed(3 * 1_000_003)
    index = torch.randint(48, (4,), generator=generator)
    noise = torch.randn(4, 4, 4, 4, generator=generator)
    timesteps = torch.randint(1000, (4,), generator=generator)
    total = error = 0.0
    for latent, eps, t in zip(torch.cat(clean)[index], noise, timesteps, strict=True):
        noisy = alphas[t].sqrt() * latent + (1 - alphas[t]).sqrt() * eps
        with torch.no_grad():
            predicted = unet(noisy[None], t, encoder_hidden_states=torch.zeros(1, 4, 64)).sample
        squared = float((predicted[0] - eps).square().mean())
        ratio = float(alphas[t] / (1 - alphas[t]))
        total += min(ratio, 5.0) / ratio * squared / 4
        error += squared / 4
    assert seen[0]["loss"] == pytest.approx(total, rel=1e-4)
    assert seen[0]["error"] == pytest.approx(error, rel=1e-4)


def test_captions_know_colours_and_no_shapes():
    flat = torch.tensor([0.5, -0.25, 1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    checks = flat + torch.tensor([[0.3, -0.3], [-0.3, 0.3]]).repeat(16, 16)
    torch.testing.assert_close(captions(flat), captions(checks), atol=1e-5, rtol=0)
    assert not torch.allclose(captions(flat), captions(flat.flip(1)))


def _train_in_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    accelerator = Accelerator(cpu=True)
    images = load_file(folder / "images.safetensors")["images"]
    vae = vae_of(images, folder / "two", num_steps=2, accelerator=accelerator)
    unet = unet_of(images, vae, folder / "two", num_steps=2, accelerator=accelerator)
    state = {f"vae.{k}": v for k, v in vae.state_dict().items()}
    state |= {f"unet.{k}": v for k, v in unet.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_train_the_model_of_one(images: Tensor, tmp_path: Path):
    save_file({"images": images}, tmp_path / "images.safetensors")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    mp.spawn(_train_in_two, (tmp_path,), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    vae = vae_of(images, tmp_path / "one", num_steps=2)
    unet = unet_of(images, vae, tmp_path / "one", num_steps=2)
    for prefix, model in (("vae", vae), ("unet", unet)):
        for name, tensor in model.state_dict().items():
            assert torch.equal(first[f"{prefix}.{name}"], second[f"{prefix}.{name}"])
            # Adam's first steps are of the size of the learning rate whatever the gradient's, and
            # its sign, where it is all but zero, is a matter of rounding.
            close = torch.isclose(first[f"{prefix}.{name}"], tensor, atol=2e-5)
            assert close.float().mean() > 0.98, name


def test_batch_that_does_not_divide_is_refused(images: Tensor, tmp_path: Path):
    three = SimpleNamespace(num_processes=3, process_index=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="4 images do not divide over 3 processes"):
        vae_of(images, tmp_path, accelerator=three)
