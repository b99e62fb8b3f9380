"""contradiff.sampling against DDIM written out, and its independence of the batch size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.backbone import load_vae
from contradiff.latents import decode_latents
from contradiff.model import ContraDiff
from contradiff.sampling import (
    GenerateParams,
    denoise,
    generate_unconditional,
    load_scheduler,
    seeded_noise,
)


@pytest.fixture
def model(build_tiny: Callable[..., ContraDiff]) -> ContraDiff:
    return build_tiny()


def slow_ddim(
    model: ContraDiff, latents: Tensor, num_steps: int, predict: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """DDIM's Eq. 12 with sigma = 0 on "leading" timesteps, offset 1, ending at alpha-bar of 0."""
    alphas = model.schedule.alphas_cumprod
    stride = 1000 // num_steps
    for k in reversed(range(num_steps)):
        timestep = k * stride + 1
        alpha = alphas[timestep]
        previous = alphas[timestep - stride] if timestep >= stride else alphas[0]
        noise_pred = predict(latents, timestep)
        clean = (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
        latents = previous.sqrt() * clean + (1 - previous).sqrt() * noise_pred
    return latents


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_denoise_equals_ddim_written_out(model: ContraDiff, tiny_base: Path):
    latents, tokens = draw(2, 4, 8, 8, seed=0), draw(2, 16, 16, seed=1)
    scheduler = load_scheduler(tiny_base, num_inference_steps=7)
    ours = denoise(model, scheduler, latents, tokens)

    def predict(noisy: Tensor, timestep: int) -> Tensor:
        return model.unet(noisy, timestep, encoder_hidden_states=tokens).sample

    expected = slow_ddim(model, latents, 7, predict)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def generate(
    model: ContraDiff, base: Path, *, batch_size: int, seed: int = 0
) -> tuple[list[Tensor], list[int]]:
    progress: list[int] = []
    batches = generate_unconditional(
        model,
        load_vae(base),
        load_scheduler(base, num_inference_steps=3),
        params=GenerateParams(num_samples=5, num_inference_steps=3, batch_size=batch_size),
        image_size=32,
        seed=seed,
        device=torch.device("cpu"),
        on_progress=progress.append,
    )
    return list(batches), progress


def test_samples_do_not_depend_on_the_batch_size(model: ContraDiff, tiny_base: Path):
    whole, progress = generate(model, tiny_base, batch_size=8)
    assert [len(batch) for batch in whole] == progress == [5]
    parts, progress = generate(model, tiny_base, batch_size=2)
    assert [len(batch) for batch in parts] == progress == [2, 2, 1]
    samples = torch.cat(parts)
    assert samples.shape == (5, 3, 32, 32)
    assert samples.dtype == torch.uint8
    # A level of 255 at most: sums are taken in another order.
    torch.testing.assert_close(samples.float(), whole[0].float(), rtol=0, atol=1)
    assert len(samples.flatten(1).unique(dim=0)) == 5


def test_samples_depend_on_the_seed(model: ContraDiff, tiny_base: Path):
    first, _ = generate(model, tiny_base, batch_size=5, seed=0)
    again, _ = generate(model, tiny_base, batch_size=5, seed=0)
    other, _ = generate(model, tiny_base, batch_size=5, seed=1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@torch.no_grad()
def test_a_sample_is_made_of_its_own_noises(model: ContraDiff, tiny_base: Path):
    """Sample 3 by hand: c(Gaussian pixels), DDIM, the VAE."""
    whole, _ = generate(model, tiny_base, batch_size=5, seed=7)
    latents = seeded_noise((4, 8, 8), seed=7, index=3, stream="latent")[None]
    pixels = seeded_noise((3, 32, 32), seed=7, index=3, stream="condition")[None]
    tokens = model.encode_condition(pixels)

    def predict(noisy: Tensor, timestep: int) -> Tensor:
        return model.unet(noisy, timestep, encoder_hidden_states=tokens).sample

    expected = decode_latents(load_vae(tiny_base), slow_ddim(model, latents, 3, predict))
    torch.testing.assert_close(whole[0][3].float(), expected[0].float(), rtol=0, atol=1)


def test_seeded_noise_repeats_and_its_streams_differ():
    key: dict[str, Any] = {"seed": 5, "index": 2, "stream": "latent"}
    noise = seeded_noise((4, 32, 32), **key)
    assert torch.equal(noise, seeded_noise((4, 32, 32), **key))
    for change in ({"seed": 6}, {"index": 3}, {"stream": "condition"}):
        other = seeded_noise((4, 32, 32), **key | change)
        # Independent: correlations of 4096 pairs stay within five standard errors.
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / 64
    assert abs(noise.mean()) < 5 / 64
    assert abs(noise.std() - 1) < 5 / 64


@pytest.mark.parametrize("num_steps", [1, 20, 100, 500, 999])
def test_steps_within_the_schedule_are_taken(tiny_base: Path, num_steps: int):
    timesteps = load_scheduler(tiny_base, num_inference_steps=num_steps).timesteps
    expected = [k * (1000 // num_steps) + 1 for k in reversed(range(num_steps))]
    assert timesteps.tolist() == expected


@pytest.mark.parametrize("num_steps", [1000, 1001])
def test_too_many_steps_are_refused(tiny_base: Path, num_steps: int):
    """1000 too: the base's steps_offset would make its first timestep 1000, beyond the grid."""
    with pytest.raises(ValueError, match=rf"generate\.num_inference_steps: {num_steps} is more"):
        load_scheduler(tiny_base, num_inference_steps=num_steps)
