"""The UNet's maps during DDIM inversion, which turns an image into noise without random numbers."""

from collections.abc import Sequence

import torch

from contradiff.features.params import CHAIN_STEPS
from contradiff.method.attention import LevelMaps
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import clean_and_noise
from contradiff.method.params import MapBlock
from contradiff.types import Latents, Maps, Tokens


def inverted_maps(
    model: ContraDiffModel,
    latents: Latents,
    tokens: Tokens,
    *,
    timesteps: Sequence[int],
    blocks: Sequence[MapBlock],
) -> dict[MapBlock, LevelMaps]:
    """Return maps at three timesteps of a deterministic DDIM inversion (eta = 0), noisiest first.

    The inversion goes up the base's 20-step grid t_0 < t_1 < ... (Stable Diffusion: 1, 51, ...,
    951). The clean latent is used as z_{t_0}, unscaled. At each t_k the UNet runs once, on z_{t_k}.
    This pass gives the maps of t_k and the predicted noise e (which follows from v, if the base
    predicts v). From e follows the next latent (Eq. 12 of Song et al., 2021, in reverse). a and a'
    are the alpha-bars of t_k and t_{k+1}:

        z_{t_{k+1}} = sqrt(a') (z_{t_k} - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a') e

    This step is exact only if e is the same at t_k and t_{k+1}. diffusers' pipelines predict e from
    z_{t_k} at timestep t_{k+1} instead, so their maps would have less noise than the timestep says.
    The inversion stops at the noisiest of `timesteps`, where only the maps are computed.

    *Deviation*: the paper explains neither its 20 steps nor which maps it reads. This function is
    one interpretation. `ContraDiffModel.level_maps`, which adds noise in one step (Eq. 5), is
    another.
    """
    grid = model.schedule.ddim_timesteps(CHAIN_STEPS)
    assert set(timesteps) <= set(grid), "rules.py has checked that they are on the grid"
    chain = grid[: grid.index(max(timesteps)) + 1]
    alphas = model.schedule.alphas_cumprod.to(latents)
    unet = model.split_unet
    maps: dict[MapBlock, list[Maps]] = {block: [] for block in blocks}
    for timestep, above in zip(chain, [*chain[1:], None], strict=True):
        steps = torch.full((len(latents),), timestep, device=latents.device)
        read = blocks if timestep in timesteps else ()
        state = unet.down(latents, steps, tokens, blocks=read)
        for block in read:
            maps[block].append(unet.maps(state, block))
        if above is not None:
            a, a_above = alphas[timestep], alphas[above]
            clean_pred, noise_pred = clean_and_noise(
                unet.predict(state), latents, a, prediction_type=model.schedule.prediction_type
            )
            latents = a_above.sqrt() * clean_pred + (1 - a_above).sqrt() * noise_pred
    return {block: torch.stack(found[::-1], dim=1) for block, found in maps.items()}
