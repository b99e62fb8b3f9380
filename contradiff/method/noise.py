"""The noise levels of training: how timesteps are drawn, and how noise is added to latents."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from contradiff.config import Section
from contradiff.types import Latents, Timesteps

PerTimestep = Float[Tensor, " timesteps"]
"""One number for each timestep of the base's training grid."""
NUM_VIEWS = 2
NUM_LEVELS = 3
"""A view has three noise levels, one each for query, key and value (Eq. 4)."""


class NoiseParams(Section):
    """Section `noise`: how training timesteps are drawn. The base's betas stay as they are."""

    schedule: Literal["inverse_cosine", "uniform"] = Field(description="Sec. 3.4; SODA's schedule")
    uniform_mix: float = Field(
        ge=0, le=1, description="chance that a draw for the reconstruction loss is uniform instead"
    )


def timestep_probabilities(alphas_cumprod: PerTimestep, *, schedule: str) -> PerTimestep:
    """Compute the probability of each training timestep, in float64.

    SODA (Hudson et al., 2024) draws u uniformly and adds noise until alpha-bar is
    (2/pi) arccos(sqrt(u)), so that P(alpha-bar <= a) = 1 - cos^2(pi a / 2). The base has a grid of
    alpha-bars: each timestep gets the probability between the midpoints to its two neighbours, and
    the outermost intervals end at 1 and 0. With schedule "uniform" all timesteps are as likely.
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
    """Draw two independent triples of timesteps for each image (Eqs. 4, 5).

    The reconstruction loss uses the first `recon_passes` of the six draws, in the order (view,
    level). Each of these is replaced by a uniform draw with probability `uniform_mix`; it also
    belongs to its view's triple, so the contrastive loss sees it too. The draws are not sorted, so
    that each one follows the schedule.

    *Deviation*: the paper draws no timesteps uniformly (uniform_mix 0). Timesteps above 700, which
    generation needs, are then only 1.7% of the draws.
    """
    num_draws = NUM_VIEWS * NUM_LEVELS * batch_size
    draws = torch.multinomial(probabilities, num_draws, replacement=True, generator=generator)
    draws = draws.view(NUM_VIEWS * NUM_LEVELS, batch_size)
    # Drawn with every setting, so that the random numbers after these do not depend on it.
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
