"""Diagnostics of a trained model: what its feature h depends on, and how well the model denoises.

The two views of an image are its stored centre crop and a stored random crop. Validation images
have only one view, so the images are training images: about a tenth of them, the dev split. The
model has been trained on these images too.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from contradiff.data.shard_info import LatentInfo
from contradiff.data.shards import ShardIndex, read_images
from contradiff.data.subsets import is_dev
from contradiff.features.batches import CleanBatch, stored_batches
from contradiff.features.models import DiffusionFeatures, autocast, image_noise
from contradiff.features.spread import effective_rank
from contradiff.method.noise import add_noise, clean_and_noise

NUM_PAIRS = 256
"""Most images that are used to compare two views."""
NUM_DENOISED = 250
"""Most validation images that are used for the denoising error."""
NUM_STEPS = 10
"""Number of noise levels at which the denoising error is measured."""

Table: TypeAlias = Float[Tensor, "n width"]


def two_views(images: Path, latents: Path) -> tuple[CleanBatch, CleanBatch] | None:
    """Read both views of the first NUM_PAIRS dev images; None if there are fewer than two images.

    Both views have the pixels of the centre crop; only the latents differ. If latents.views is 1,
    the latents are those of the centre crop as well.
    """
    samples = enumerate(read_images(images, "train"))
    dev = list(islice((index for index, sample in samples if is_dev(sample.key)), NUM_PAIRS))
    if len(dev) < 2:
        return None
    second = min(1, ShardIndex.read(latents, LatentInfo).info.views - 1)
    read = partial(stored_batches, images, latents, split="train", batch_size=NUM_PAIRS, chosen=dev)
    [one], [two] = read(view=0), read(view=second)
    return one, two


def partners(queries: Table, candidates: Table) -> Int64[Tensor, " n"]:
    """Return, for each query, the row of the candidate with the largest cosine similarity."""
    queries, candidates = (F.normalize(each.double(), dim=1) for each in (queries, candidates))
    return (queries @ candidates.T).argmax(dim=1)


def alignment(first: Table, second: Table) -> float:
    """Mean squared distance of two views' unit vectors, in [0, 4] (Wang and Isola, 2020)."""
    one, two = (F.normalize(each.double(), dim=1) for each in (first, second))
    return float((one - two).square().sum(dim=1).mean())


def uniformity(features: Table) -> float:
    """Log of the mean of exp(-2 d^2); d: distance of two unit vectors (Wang and Isola, 2020)."""
    return float(F.pdist(F.normalize(features.double(), dim=1)).square().mul(-2).exp().mean().log())


def view_metrics(
    model: DiffusionFeatures, first: CleanBatch, second: CleanBatch
) -> dict[str, dict[str, float]]:
    """Measure how often h finds an image's other view, and how h and the UNet's maps spread.

    "retrieval": each second view looks for the first view with the most similar h. "own" is the
    share that finds the same image, if both views have this image as condition. "null" is this
    share if noise is the condition. For the other two shares, the second view has another image as
    condition: "by_latent" is the share that finds the view's own image, "by_condition" the share
    that finds that other image.
    "h" and "maps" (the maps' means) tell the spread, with the condition of features.condition.
    """
    block, width = model.model.block, model.params.batch_size
    changes = {"pool": "attention", "more_blocks": [block], "more_triples": []}

    def features(batch: CleanBatch, condition: str, shown: CleanBatch, view: int) -> list[Table]:
        params = model.params.model_copy(update=changes | {"condition": condition})
        own = replace(model, params=params, seed=model.seed + 2 * view, keep_maps=False)
        rows = zip(batch.split(width), shown.split(width), strict=True)
        tables = [list(own(one, other).values()) for one, other in rows]
        return [torch.cat(column).float().cpu() for column in zip(*tables, strict=True)]

    order = np.random.default_rng(model.seed).permutation(len(first.keys))
    exchanged = torch.empty(len(order), dtype=torch.long)
    exchanged[order] = torch.from_numpy(np.roll(order, 1))  # no image keeps its own
    other = replace(first, latents=first.latents[exchanged], pixels=first.pixels[exchanged])
    own = [features(view, "image", first, number) for number, view in enumerate((first, second))]
    null = [features(view, "noise", view, number) for number, view in enumerate((first, second))]
    found = partners(features(second, "image", other, 1)[0], own[0][0])
    same = torch.arange(len(found))
    hits = {
        "own": partners(own[1][0], own[0][0]) == same,
        "null": partners(null[1][0], null[0][0]) == same,
        "by_latent": found == same,
        "by_condition": found == exchanged,
    }
    metrics = {"retrieval": {name: float(hit.double().mean()) for name, hit in hits.items()}}
    one, two = own if model.params.condition == "image" else null
    for name, view1, view2 in zip(("h", "maps"), one, two, strict=True):
        metrics[name] = {
            "alignment": alignment(view1, view2),
            "uniformity": uniformity(view1),
            "effective_rank": effective_rank(view1),
        }
    return metrics


@torch.inference_mode()
def denoising_error(model: DiffusionFeatures, batches: Iterable[CleanBatch]) -> float:
    """Mean squared error of the predicted noise (Eq. 3) at 5%, 15%, ... 95% of the schedule.

    The condition is features.condition (zeros for the base). An image's index seeds its noise. If
    the base predicts v, the noise is computed from v, so errors of all bases have the same unit.
    """
    schedule, errors = model.model.schedule, list[Tensor]()
    spacing = schedule.num_train_timesteps / NUM_STEPS
    steps = [int(spacing * (number + 0.5)) for number in range(NUM_STEPS)]
    for batch in batches:
        latents = batch.latents.to(model.device)
        shape = (NUM_STEPS, *latents.shape[1:])
        noise = image_noise(shape, batch.indices, seed=model.seed).to(model.device)
        with autocast(model.device, model.params.precision):
            tokens = model.tokens(batch)
            for level, step in enumerate(steps):
                at = torch.full((len(latents),), step, device=model.device)
                noisy = add_noise(latents, noise[:, level], at, schedule.alphas_cumprod)
                prediction = model.model.predict(noisy, at, tokens).float()
                alpha, kind = schedule.alphas_cumprod.to(noisy)[step], schedule.prediction_type
                _, noise_pred = clean_and_noise(prediction, noisy, alpha, prediction_type=kind)
                errors.append((noise_pred - noise[:, level]).square().mean(dim=(1, 2, 3)))
    return float(torch.cat(errors).double().mean())
