"""The reconstruction loss (Eq. 3), and contrastive losses of two views (Eq. 6 and its neighbours).

Each contrastive loss takes the projected features of two views, row i of both from the same image;
similarity is the cosine, so they need not be normalised. `anchors` are the images whose loss is
averaged, all by default: a process passes its own where the views hold those of all processes, and
the mean over processes is then the loss of the whole batch. Fewer than two images are a ValueError.
"""

import math
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from contradiff.config import Section
from contradiff.method.noise import PerTimestep
from contradiff.types import Latents

View = Float[Tensor, "num_images width"]
Loss = Float[Tensor, ""]
ALL = slice(None)


class LossParams(Section):
    """Section `loss`: reconstruction + lambda * contrastive (Eq. 7)."""

    weight: float = Field(alias="lambda", ge=0, description="lambda of Eq. 7")
    contrastive: Literal["ntxent", "dcl_paper", "infonce"] = Field(
        description="dcl_paper is Eq. 6 as printed, but the mean"
    )
    temperature: float = Field(gt=0, description="tau of Eq. 6")
    latent_views: Literal["same", "two"] = Field(
        description="same: both views are noisings of one latent (Eq. 5) | two: the first is of the"
        " centre crop, the second of a random crop"
    )
    recon_passes: int = Field(
        ge=1, le=6, description="how many of an image's six draws are denoised (Eq. 3)"
    )
    min_snr_gamma: float = Field(
        ge=0, description="reconstruction weights min(SNR, gamma) / SNR; 0: none (paper)"
    )


def reconstruction_loss(
    noise_pred: Latents, noise: Latents, *, weights: Float[Tensor, " batch"] | None
) -> Loss:
    """Eq. 3: the mean squared error of the predicted noise, each sample times its weight."""
    if weights is None:
        return F.mse_loss(noise_pred.float(), noise.float())
    error = F.mse_loss(noise_pred.float(), noise.float(), reduction="none")
    return (weights * error.mean(dim=(1, 2, 3))).mean()


def min_snr_weights(alphas_cumprod: PerTimestep, *, gamma: float) -> PerTimestep:
    """min(SNR, gamma) / SNR of each timestep (Hang et al., 2023), for a predicted noise."""
    ratio = alphas_cumprod / (1.0 - alphas_cumprod)
    return ratio.clamp(max=gamma) / ratio


def ntxent(view1: View, view2: View, *, temperature: float, anchors: slice = ALL) -> Loss:
    """Symmetric NT-Xent (SimCLR): both views are anchors, all 2N - 1 others are candidates.

    Example:
        >>> view1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> ntxent(view1, view1, temperature=0.5)  # log(1 + 2 exp(-2))
        tensor(0.2395)
    """
    first, second, rows = _unit(view1, view2, anchors)
    num_images, everything = len(first), torch.cat([first, second])
    rows = torch.cat([rows, rows + num_images])
    logits = _product(everything[rows], everything) / temperature
    logits = logits.scatter(1, rows[:, None], -math.inf)
    return F.cross_entropy(logits, (rows + num_images) % (2 * num_images))


def dcl_paper(view1: View, view2: View, *, temperature: float, anchors: slice = ALL) -> Loss:
    """Eq. 6 to the letter: anchors of view 1, no positive in the denominator, the factor 2.

    *Deviation*: the mean over images, not the sum, so that lambda does not depend on the batch.

    Example:
        >>> view1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> dcl_paper(view1, view1, temperature=0.5)  # log(2 exp(0)) - 1 / 0.5 - log 2
        tensor(-2.)
    """
    first, second, rows = _unit(view1, view2, anchors)
    within = _product(first[rows], first) / temperature
    across = _product(first[rows], second) / temperature
    positive = across.gather(1, rows[:, None])[:, 0]
    negatives = [logits.scatter(1, rows[:, None], -math.inf) for logits in (within, across)]
    return (torch.cat(negatives, dim=1).logsumexp(dim=1) - positive - math.log(2)).mean()


def infonce(view1: View, view2: View, *, temperature: float, anchors: slice = ALL) -> Loss:
    """InfoNCE (Oord et al., 2018), one direction: view 1 finds its partner among all of view 2.

    Example:
        >>> view1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> infonce(view1, view1, temperature=0.5)  # log(1 + exp(-2))
        tensor(0.1269)
    """
    first, second, rows = _unit(view1, view2, anchors)
    return F.cross_entropy(_product(first[rows], second) / temperature, rows)


CONTRASTIVE_LOSSES = {"ntxent": ntxent, "dcl_paper": dcl_paper, "infonce": infonce}
"""By their name in loss.contrastive."""


def _unit(view1: View, view2: View, anchors: slice) -> tuple[View, View, Int[Tensor, " anchors"]]:
    """Both views as unit vectors in float32, and the numbers of the anchors."""
    if len(view1) < 2:
        fault = "a contrastive loss needs at least two images in a batch"
        raise ValueError(f"pretrain.batch_size: {fault}")
    first, second = (F.normalize(view.float(), dim=-1) for view in (view1, view2))
    return first, second, torch.arange(len(first), device=first.device)[anchors]


def _product(
    first: View, second: Float[Tensor, "others width"]
) -> Float[Tensor, "num_images others"]:
    """Cosines in float32: autocast would round them to bfloat16, which 1 / tau then magnifies."""
    device = first.device.type
    known = torch.amp.is_autocast_available(device)  # not to the meta device
    with torch.autocast(device, enabled=False) if known else nullcontext():
        return first @ second.T
