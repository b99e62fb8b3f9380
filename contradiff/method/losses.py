"""The reconstruction loss (Eq. 3), and contrastive losses over two views (Eq. 6, neighbours)."""

import math
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from contradiff.config import Section
from contradiff.types import Latents

ContrastiveKind = Literal["ntxent", "dcl_paper", "infonce"]
Views = Float[Tensor, "2 num_images width"]
"""Projected features of all images: view 1 and view 2, row i of both the same image."""


class LossParams(Section):
    """Section `loss`: reconstruction + lambda * contrastive (Eq. 7)."""

    weight: float = Field(alias="lambda", ge=0, description="lambda of Eq. 7")
    contrastive: ContrastiveKind = Field(description="dcl_paper is Eq. 6 as printed, but the mean")
    temperature: float = Field(gt=0, description="tau of Eq. 6")
    latent_views: Literal["same", "two"] = Field(
        description="same: both views are noisings of one latent (Eq. 5) | two: the first is of the"
        " centre crop, the second of a random crop"
    )
    recon_passes: int = Field(ge=1, le=6, description="of six draws, how many are denoised (Eq. 3)")
    min_snr_gamma: float = Field(
        ge=0, description="reconstruction weights min(SNR, gamma) / SNR; 0: none (paper)"
    )


def reconstruction_loss(
    noise_pred: Latents, noise: Latents, *, weights: Float[Tensor, " batch"] | None
) -> Float[Tensor, ""]:
    """Eq. 3: the mean squared error of the predicted noise, each sample times its weight."""
    if weights is None:
        return F.mse_loss(noise_pred.float(), noise.float())
    error = F.mse_loss(noise_pred.float(), noise.float(), reduction="none")
    return (weights * error.mean(dim=(1, 2, 3))).mean()


def min_snr_weights(
    alphas_cumprod: Float[Tensor, " timesteps"], *, gamma: float
) -> Float[Tensor, " timesteps"]:
    """min(SNR, gamma) / SNR of each timestep (Hang et al., 2023), for a predicted noise.

    SNR = alpha-bar / (1 - alpha-bar). Less weight on low noise, whose error a glance forgives.
    """
    ratio = alphas_cumprod / (1.0 - alphas_cumprod)
    return ratio.clamp(max=gamma) / ratio


def contrastive_loss(
    views: Views, *, kind: ContrastiveKind, temperature: float, anchors: slice = slice(None)
) -> Float[Tensor, ""]:
    """Mean contrastive loss of some images as anchors, against all images.

    Args:
        views: not yet normalised; similarity is the cosine.
        kind: which loss; see the functions below.
        temperature: tau.
        anchors: the images whose loss is averaged: this process's own, when `views` holds those of
            all processes. Averaged over processes it is the loss of the whole batch.

    Raises:
        ValueError: fewer than two images, so that there are no negatives.
    """
    num_images = views.shape[1]
    if num_images < 2:
        raise ValueError(
            "pretrain.batch_size: a contrastive loss needs at least two images in a batch"
        )
    loss = {"ntxent": _ntxent, "dcl_paper": _dcl_paper, "infonce": _infonce}[kind]
    rows = torch.arange(num_images, device=views.device)[anchors]
    # Autocast would round the similarities to bfloat16, which 1 / tau then magnifies.
    device = views.device.type
    known = torch.amp.is_autocast_available(device)  # not to the meta device
    with torch.autocast(device, enabled=False) if known else nullcontext():
        return loss(F.normalize(views.float(), dim=-1), temperature, rows)


def _ntxent(unit: Views, temperature: float, anchors: Tensor) -> Tensor:
    """Symmetric NT-Xent (SimCLR): both views are anchors, all 2N - 1 others are candidates."""
    num_images = unit.shape[1]
    rows = torch.cat([anchors, anchors + num_images])
    everything = unit.flatten(0, 1)
    logits = everything[rows] @ everything.T / temperature
    logits.scatter_(1, rows[:, None], -math.inf)
    return F.cross_entropy(logits, (rows + num_images) % (2 * num_images))


def _dcl_paper(unit: Views, temperature: float, anchors: Tensor) -> Tensor:
    """Eq. 6 to the letter: anchors of view 1, no positive in the denominator, the factor 2.

    Deviation: the mean over i instead of the sum, so that lambda does not depend on the batch.
    """
    first, second = unit
    within = first[anchors] @ first.T / temperature
    across = first[anchors] @ second.T / temperature
    positive = across.gather(1, anchors[:, None])[:, 0]
    own = torch.zeros_like(within).scatter_(1, anchors[:, None], -math.inf)
    negatives = torch.cat([within + own, across + own], dim=1)
    return (negatives.logsumexp(dim=1) - positive - math.log(2)).mean()


def _infonce(unit: Views, temperature: float, anchors: Tensor) -> Tensor:
    """InfoNCE (Oord et al., 2018), one direction: view 1 finds its partner among all of view 2."""
    first, second = unit
    return F.cross_entropy(first[anchors] @ second.T / temperature, anchors)
