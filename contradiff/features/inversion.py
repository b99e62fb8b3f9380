"""Maps along a chain of DDIM inversion, which finds an image's own noise; no noise is drawn."""

from collections.abc import Sequence

import torch

from contradiff.method.attention import LevelMaps
from contradiff.method.model import ContraDiff
from contradiff.method.unet import MapBlock
from contradiff.types import Latents, Maps, Tokens

CHAIN_STEPS = 20
"""Length of the whole chain's grid ("using 20 denoising steps", the linear probe's section)."""


def inverted_maps(
    model: ContraDiff,
    latents: Latents,
    tokens: Tokens,
    *,
    timesteps: Sequence[int],
    blocks: Sequence[MapBlock],
) -> dict[MapBlock, LevelMaps]:
    """Maps at three points of a deterministic DDIM inversion (eta = 0): noisiest, middle, cleanest.

    The chain climbs the base's own 20-step grid t_0 < t_1 < ..., for Stable Diffusion 1, 51, ...,
    951. The clean latent itself is taken to be z_{t_0}: it is not scaled to t_0's noise level,
    where alpha-bar is 0.998. Every grid point has one pass: it sees z_{t_k} at timestep t_k, gives
    the maps of t_k, and its predicted noise e leads on (Eq. 12 of Song et al., 2021, upwards), with
    a and a' the alpha-bars of t_k and t_{k+1}:

        z_{t_{k+1}} = sqrt(a') (z_{t_k} - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a') e

    This is exact only where e is the same at both points. diffusers' pipelines predict e at
    timestep t_{k+1} from z_{t_k} instead; maps so taken would lag behind their timestep. The chain
    ends at the noisiest timestep, whose noise is not predicted.

    *Deviation*: the paper says neither how its 20 steps go nor which of their maps are read. This
    is one reading; Eq. 5, in one step, is the other (`ContraDiff.level_maps`).
    """
    grid = model.schedule.ddim_timesteps(CHAIN_STEPS)
    assert set(timesteps) <= set(grid), "rules.py refuses others"
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
            noise_pred = unet.noise_pred(state)
            a, a_above = alphas[timestep], alphas[above]
            clean_pred = (latents - (1 - a).sqrt() * noise_pred) / a.sqrt()
            latents = a_above.sqrt() * clean_pred + (1 - a_above).sqrt() * noise_pred
    return {block: torch.stack(found[::-1], dim=1) for block, found in maps.items()}
