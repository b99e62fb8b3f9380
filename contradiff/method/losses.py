"""The reconstruction loss (Eq. 3) and five contrastive losses. The loss `dcl_paper` is Eq. 6.

A batch has two versions ("views") of every image. A contrastive loss gets the projected features of
both views; row i belongs to image i. All losses except `dispersive` normalise the features. A loss
is averaged over the images `anchors` (default: all images). With several processes, the views have
the images of all processes, but `anchors` are only the images of this process. Contrastive losses
raise ValueError if there are fewer than two images.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contradiff.base.config import PredictionType
from contradiff.method.noise import PerTimestep
from contradiff.types import Latents

View = Float[Tensor, "num_images width"]
Loss = Float[Tensor, ""]
ALL = slice(None)


def reconstruction_loss(
    prediction: Latents, target: Latents, *, weights: Float[Tensor, " batch"] | None
) -> Loss:
    """Compute Eq. 3: the mean squared error of the predicted noise or v, with optional weights."""
    if weights is None:
        return F.mse_loss(prediction.float(), target.float())
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return (weights * error.mean(dim=(1, 2, 3))).mean()


def min_snr_weights(
    alphas_cumprod: PerTimestep, *, gamma: float, prediction_type: PredictionType
) -> PerTimestep:
    """Compute the weights min(SNR, gamma) / SNR of all timesteps (Hang et al., 2023).

    They weight an error of the noise. An error of v gets min(SNR, gamma) / (SNR + 1). Both mean a
    weight of min(SNR, gamma) for the error of the clean latent.
    """
    ratio = alphas_cumprod / (1.0 - alphas_cumprod)
    of_clean = ratio.clamp(max=gamma)
    return of_clean / (ratio if prediction_type == "epsilon" else ratio + 1.0)


def ntxent(view1: View, view2: View, *, temperature: float, anchors: slice = ALL) -> Loss:
    """Compute SimCLR's NT-Xent: each of the 2N features finds its partner among the 2N - 1 others.

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
    """Compute Eq. 6 as printed, but averaged over images.

    Only view 1 has anchors. The denominator lacks the positive pair. The numerator has a factor of
    2. *Deviation*: Eq. 6 is a sum over images. We average, so that lambda need not change with the
    batch size.

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
    """Compute InfoNCE (Oord 2018): each feature of view 1 finds its partner among those of view 2.

    Example:
        >>> view1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> infonce(view1, view1, temperature=0.5)  # log(1 + exp(-2))
        tensor(0.1269)
    """
    first, second, rows = _unit(view1, view2, anchors)
    return F.cross_entropy(_product(first[rows], second) / temperature, rows)


def dcl(view1: View, view2: View, *, temperature: float, anchors: slice = ALL) -> Loss:
    """Compute the symmetric DCL (Yeh et al., 2022): NT-Xent without positives in the denominator.

    Example:
        >>> view1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> dcl(view1, view1, temperature=0.5)  # log(2 exp(0)) - 1 / 0.5
        tensor(-1.3069)
    """
    forth = dcl_paper(view1, view2, temperature=temperature, anchors=anchors)
    back = dcl_paper(view2, view1, temperature=temperature, anchors=anchors)
    return (forth + back) / 2 + math.log(2)


def dispersive(view1: View, view2: View, *, temperature: float, anchors: slice = ALL) -> Loss:
    """Compute the dispersive loss (Wang and He, 2025): log mean exp(-d / tau), without positives.

    d is the squared distance between the features of two images in one view, divided by the width.
    As in the authors' code, each image is also compared with itself (d = 0). The loss is averaged
    over images and views. *Deviation*: the authors apply this loss to flattened maps. Here it is
    applied to the projected h, which is not normalised.

    Example:
        >>> view1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> dispersive(view1, view1, temperature=0.5)  # log((1 + exp(-1 / 0.5)) / 2)
        tensor(-0.5662)
    """
    _refuse_a_single_image(view1)
    views = torch.stack([view1, view2]).float()
    exact = "donot_use_mm_for_euclid_dist"  # the other way subtracts large numbers
    distances = torch.cdist(views[:, anchors], views, compute_mode=exact).square() / views.shape[-1]
    return (-distances / temperature).exp().mean(dim=-1).log().mean()


CONTRASTIVE_LOSSES = {
    "ntxent": ntxent,
    "dcl_paper": dcl_paper,
    "dcl": dcl,
    "infonce": infonce,
    "dispersive": dispersive,
}
"""The contrastive losses by their names in the parameter loss.contrastive."""


def _unit(view1: View, view2: View, anchors: slice) -> tuple[View, View, Int[Tensor, " anchors"]]:
    """Return both views as unit vectors in float32, and the row numbers of the anchors."""
    _refuse_a_single_image(view1)
    first, second = (F.normalize(view.float(), dim=-1) for view in (view1, view2))
    return first, second, torch.arange(len(first), device=first.device)[anchors]


def _refuse_a_single_image(view: View) -> None:
    if len(view) < 2:
        fault = "a contrastive loss needs at least two images in a batch; raise the batch size"
        raise ValueError(f"pretrain.batch_size: {fault}")


def _product(
    first: View, second: Float[Tensor, "others width"]
) -> Float[Tensor, "num_images others"]:
    """Compute cosines in float32, because the division by tau magnifies rounding errors."""
    device = first.device.type
    known = torch.amp.is_autocast_available(device)  # False for the meta device
    with torch.autocast(device, enabled=False) if known else nullcontext():
        return first @ second.T
