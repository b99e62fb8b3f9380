"""The noise levels equal closed forms, our notes' numbers, and diffusers."""

import math

import pytest
import torch
from torch import Tensor

from contradiff.method.noise import add_noise, draw_timesteps, timestep_probabilities
from contradiff.toy.base_recipe import build_scheduler


@pytest.fixture(scope="module")
def alphas_cumprod() -> Tensor:
    """The alpha-bars of Stable Diffusion's timesteps."""
    return build_scheduler().alphas_cumprod


def draw(probabilities: Tensor, *, recon_passes: int, uniform_mix: float, n: int = 4000) -> Tensor:
    mix = {"recon_passes": recon_passes, "uniform_mix": uniform_mix}
    generator = torch.Generator().manual_seed(0)
    return draw_timesteps(probabilities, batch_size=n, **mix, generator=generator)


def test_probabilities_are_the_inverse_cosine_schedule_on_the_grid(alphas_cumprod: Tensor):
    """Compare with SODA's sampler: uniform u, alpha-bar(u), then the nearest timestep."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    alphas = 2 / math.pi * torch.arccos(u.sqrt())
    grid = alphas_cumprod.double().flip(0)
    nearest = torch.bucketize(alphas, (grid[1:] + grid[:-1]) / 2)
    counts = torch.bincount(nearest, minlength=1000).flip(0) / len(u)
    probabilities = timestep_probabilities(alphas_cumprod, schedule="inverse_cosine")
    torch.testing.assert_close(probabilities, counts.double(), rtol=0, atol=1e-5)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    reached = probabilities.cumsum(0)
    quantiles = [int((reached < q).sum()) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    assert quantiles == [129, 254, 354, 459, 618]
    assert probabilities[700:].sum().item() == pytest.approx(0.017, abs=0.0005)


def test_uniform_schedule_is_uniform(alphas_cumprod: Tensor):
    probabilities = timestep_probabilities(alphas_cumprod, schedule="uniform")
    torch.testing.assert_close(probabilities, torch.full((1000,), 0.001, dtype=torch.float64))


def test_draws_follow_the_schedule(alphas_cumprod: Tensor):
    probabilities = timestep_probabilities(alphas_cumprod, schedule="inverse_cosine")
    draws = draw(probabilities, recon_passes=6, uniform_mix=0.0)
    assert draws.shape == (2, 3, 4000)
    reached = probabilities.cumsum(0)
    for levels in draws.flatten(0, 1):
        for t in (129, 354, 618):
            # The tolerance is five standard errors of a share of 4000 draws.
            assert (levels <= t).double().mean().item() == pytest.approx(
                reached[t].item(), abs=5 * 0.5 / math.sqrt(4000)
            )
    # The timesteps of a view are not sorted.
    assert (draws[0, 0] < draws[0, 1]).double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("recon_passes", [1, 2, 6])
def test_uniform_mix_touches_only_the_draws_that_are_reconstructed(
    alphas_cumprod: Tensor, recon_passes: int
):
    probabilities = timestep_probabilities(alphas_cumprod, schedule="inverse_cosine")
    plain = draw(probabilities, recon_passes=recon_passes, uniform_mix=0.0).flatten(0, 1)
    mixed = draw(probabilities, recon_passes=recon_passes, uniform_mix=0.5).flatten(0, 1)
    assert torch.equal(plain[recon_passes:], mixed[recon_passes:])
    changed = (plain != mixed)[:recon_passes].double().mean(dim=1)
    torch.testing.assert_close(changed, torch.full_like(changed, 0.5), rtol=0, atol=0.04)
    noisy = (mixed[:recon_passes] >= 700).double().mean(dim=1)
    expected = 0.5 * 0.017 + 0.5 * 0.3
    torch.testing.assert_close(noisy, torch.full_like(noisy, expected), rtol=0, atol=0.03)


def test_add_noise_equals_diffusers():
    scheduler = build_scheduler()
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 1, 401, 998, 999])
    noisy = add_noise(latents, noise, timesteps, scheduler.alphas_cumprod)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps))
