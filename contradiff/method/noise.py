"""The noise levels of training: how timesteps are drawn, how noise is added, what is predicted.

The UNet of a base predicts the noise (prediction type "epsilon"), or v ("v_prediction"; Salimans
and Ho, 2022). With alpha-bar a of the timestep, and the clean latent z:

    z_t = sqrt(a) z + sqrt(1 - a) noise
    v = sqrt(a) noise - sqrt(1 - a) z

This is a rotation of (z, noise), so z and noise follow from z_t and v even at a = 0.
*Deviation*: the paper's base predicts the noise, so its Eq. 3 has only this case.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contradiff.base.config import PredictionType
from contradiff.base.loading import NoiseSchedule
from contradiff.method.params import NUM_LEVELS, NUM_VIEWS
from contradiff.types import Latents, Timesteps

PerTimestep = Float[Tensor, " timesteps"]
"""One number for each training timestep of the base."""


def timestep_probabilities(alphas_cumprod: PerTimestep, *, schedule: str) -> PerTimestep:
    """Compute the probability of each training timestep, in float64.

    SODA (Hudson et al., 2024) draws alpha-bar = (2/pi) arccos(sqrt(u)) with a uniform u. This means
    P(alpha-bar <= a) = 1 - cos^2(pi a / 2). The base has only one alpha-bar for each timestep, so
    the drawn alpha-bar is rounded to the nearest of these. With schedule "uniform", all timesteps
    are equally likely.
    """
    alphas = alphas_cumprod.double()
    if schedule == "uniform":
        return torch.full_like(alphas, 1.0 / len(alphas))
    middles = (alphas[1:] + alphas[:-1]) / 2
    edges = torch.cat([alphas.new_ones(1), middles, alphas.new_zeros(1)])
    return torch.cos(math.pi * edges / 2).square().diff()


def draw_timesteps(
    probabilities: PerTimestep,
    *,
    batch_size: int,
    recon_passes: int,
    uniform_mix: float,
    generator: torch.Generator,
) -> Int[Tensor, "views levels batch"]:
    """Draw three timesteps for each of the two views of each image (Eqs. 4, 5).

    The six timesteps of an image are ordered by view, then by level, but not sorted by noise. The
    reconstruction loss uses the first `recon_passes` of them. With probability `uniform_mix`, such
    a first timestep is replaced by a uniform draw, for the reconstruction and contrastive loss.

    *Deviation*: the paper draws no timesteps uniformly (uniform_mix 0). Then only 1.7% of the
    timesteps are above 700, but generation needs these timesteps.
    """
    num_draws = NUM_VIEWS * NUM_LEVELS * batch_size
    draws = torch.multinomial(probabilities, num_draws, replacement=True, generator=generator)
    draws = draws.view(NUM_VIEWS * NUM_LEVELS, batch_size)
    # These are drawn even if unused, so that later random numbers do not depend on the settings.
    device = probabilities.device
    uniform = torch.randint(len(probabilities), draws.shape, generator=generator, device=device)
    mixed = torch.rand(draws.shape, generator=generator, device=device) < uniform_mix
    mixed[recon_passes:] = False
    return torch.where(mixed, uniform, draws).view(NUM_VIEWS, NUM_LEVELS, batch_size)


def add_noise(
    latents: Latents, noise: Latents, timesteps: Timesteps, alphas_cumprod: PerTimestep
) -> Latents:
    """Compute z_t = sqrt(alpha-bar_t) z + sqrt(1 - alpha-bar_t) noise (Eqs. 1, 5)."""
    alphas = alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt() * latents + (1.0 - alphas).sqrt() * noise


def prediction_target(
    latents: Latents, noise: Latents, timesteps: Timesteps, schedule: NoiseSchedule
) -> Latents:
    """Return what the base's UNet is trained to predict (Eq. 3): the noise or v."""
    if schedule.prediction_type == "epsilon":
        return noise
    alphas = schedule.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt() * noise - (1.0 - alphas).sqrt() * latents


def clean_and_noise(
    prediction: Latents,
    noisy_latents: Latents,
    alpha: Float[Tensor, ""],
    *,
    prediction_type: PredictionType,
) -> tuple[Latents, Latents]:
    """Compute the clean latents and the noise that a prediction means, all at one `alpha`."""
    if prediction_type == "epsilon":
        return (noisy_latents - (1 - alpha).sqrt() * prediction) / alpha.sqrt(), prediction
    clean = alpha.sqrt() * noisy_latents - (1 - alpha).sqrt() * prediction
    return clean, alpha.sqrt() * prediction + (1 - alpha).sqrt() * noisy_latents
