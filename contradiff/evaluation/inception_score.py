"""The inception score (Salimans et al., 2016)."""

import torch
from jaxtyping import Float
from torch import Tensor


def inception_score(
    probabilities: Float[Tensor, "n classes"], *, splits: int
) -> tuple[float, float]:
    """Mean and standard deviation, over splits, of exp(mean KL(p(y|x) || p(y))).

    Between 1 (every image gets the same classes) and the number of classes (all images are
    classified with certainty, all classes equally often). The splits are contiguous, as in the
    reference code, so the images must not come sorted by class. Each split is worked on alone in
    float64; the deviation is the population's (`numpy.std`).

    Args:
        probabilities: p(y|x) of each image; the rows sum to 1.
        splits: number of nearly equal parts; the papers use 10 for 50,000 images. Fewer images a
            split give a lower score.

    Raises:
        ValueError: there are fewer images than splits, or a row is no distribution.
    """
    num_images = len(probabilities)
    if not 1 <= splits <= num_images:
        msg = (
            f"score.splits is {splits}, but there are {num_images} images: "
            "each split needs at least one"
        )
        raise ValueError(msg)
    scores: list[Tensor] = []
    for i in range(splits):
        part = probabilities[i * num_images // splits : (i + 1) * num_images // splits].double()
        # Written so that NaN fails too.
        if not bool(((part >= 0).all(1) & ((part.sum(1) - 1).abs() < 1e-3)).all()):
            msg = "probabilities must be finite, not negative, and sum to 1 in each row"
            raise ValueError(msg)
        # Mean KL is the mutual information of image and class: H(mean p) - mean H(p). `entr` is
        # -p log p, and 0 at 0.
        marginal = torch.special.entr(part.mean(0)).sum()
        conditional = torch.special.entr(part).sum(1).mean()
        scores.append((marginal - conditional).exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))
