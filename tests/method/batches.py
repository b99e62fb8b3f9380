"""Random batches, loss parameters and recorded maps for tests of a small model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contradiff.method.model import ContraDiffModel
from contradiff.method.objective import TrainingBatch
from contradiff.method.params import LossParams


def loss_params(**changes: Any) -> LossParams:
    loss = {"lambda": 0.3, "contrastive": "ntxent", "temperature": 0.2, "latent_views": "two"}
    return LossParams.model_validate(loss | {"recon_passes": 1, "min_snr_gamma": 0.0} | changes)


def watch_maps(model: ContraDiffModel, block: str) -> list[Tensor]:
    """Return a list to which every later complete pass of the UNet adds the maps of `block`."""
    seen: list[Tensor] = []

    def see_up(*args: Any) -> None:
        mid = seen.pop()
        up = F.adaptive_avg_pool2d(args[2], mid.shape[2:])
        seen.append(up if block == "up.1" else torch.cat([mid, up], dim=1))

    model.unet.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
    if block != "mid":
        model.unet.up_blocks[1].register_forward_hook(see_up)
    return seen


def draw_batch(num_images: int, *, cond_views: int = 2, seed: int = 0) -> TrainingBatch:
    """Draw a random batch with this number of conditions for each image."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dropped = torch.zeros(cond_views, num_images, dtype=torch.bool)
    dropped[0, 0] = dropped[-1, 1] = True
    return TrainingBatch(
        latents=gaussian(2, num_images, 4, 8, 8),
        conditions=gaussian(cond_views, num_images, 3, 32, 32),
        condition_noise=gaussian(cond_views, num_images, 3, 32, 32),
        dropped=dropped,
        timesteps=torch.randint(1000, (2, 3, num_images), generator=generator),
        noise=gaussian(2, 3, num_images, 4, 8, 8),
    )
