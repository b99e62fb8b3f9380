"""The inception score (Salimans et al., 2016), in one pass over the images.

probabilities p(y|x) (b classes), batch by batch -> InceptionSums: a sum a split -> mean, deviation
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


class InceptionSums:
    """What the inception score needs of a stream of images, in float64, however many they are.

    The splits are contiguous, as in the reference code, so the images must not come sorted by
    class. (torch-fidelity shuffles them by default, so that its splits differ, and not its mean's
    expectation.)

    Attributes:
        num_images: of the whole set, which decides where the splits end.
        marginals: (splits classes) sums of p(y|x) over each split.
        entropies: (splits) sums of the entropy of p(y|x).
        counts: (splits) images seen so far.
    """

    def __init__(self, *, num_images: int, splits: int, num_classes: int) -> None:
        """Empty sums.

        Args:
            num_images: of the whole set.
            splits: number of nearly equal parts; the papers use 10 for 50,000 images. Fewer images
                a split give a lower score.
            num_classes: of each row of probabilities.

        Raises:
            ValueError: there are fewer images than splits.
        """
        if not 1 <= splits <= num_images:
            raise ValueError(
                f"score.splits is {splits}, but there are {num_images} images: "
                "each split needs at least one"
            )
        self.num_images = num_images
        self.splits = splits
        self.marginals = torch.zeros(splits, num_classes, dtype=torch.float64)
        self.entropies = torch.zeros(splits, dtype=torch.float64)
        self.counts = torch.zeros(splits, dtype=torch.int64)

    def update(self, probabilities: Float[Tensor, "batch classes"], *, start: int) -> None:
        """Take in p(y|x) of the images from number `start` on; the rows sum to 1.

        Raises:
            ValueError: a row is no distribution.
        """
        p = probabilities.detach().double()
        # Written so that NaN fails too.
        if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-3)).all()):
            raise ValueError("probabilities must be finite, not negative, and sum to 1 in each row")
        for i in range(self.splits):
            first = max(start, i * self.num_images // self.splits)
            end = min(start + len(p), (i + 1) * self.num_images // self.splits)
            if first < end:
                part = p[first - start : end - start]
                self.marginals[i] += part.sum(0).cpu()
                # `entr` is -p log p, and 0 at 0.
                self.entropies[i] += torch.special.entr(part).sum().cpu()
                self.counts[i] += end - first

    def merge(self, other: "InceptionSums") -> None:
        """Take in other images of the same set."""
        assert (other.num_images, other.splits) == (self.num_images, self.splits), "another set"
        self.marginals = self.marginals + other.marginals
        self.entropies = self.entropies + other.entropies
        self.counts = self.counts + other.counts

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation, over splits, of exp(mean KL(p(y|x) || p(y))).

        Between 1 (every image gets the same classes) and the number of classes (all images are
        classified with certainty, all classes equally often). The deviation is the population's
        (`numpy.std`).
        """
        assert int(self.counts.sum()) == self.num_images, "images missing, or taken in twice"
        counts: Float64[Tensor, " splits"] = self.counts.double()
        # Mean KL is the mutual information of image and class: H(mean p) - mean H(p).
        marginal = torch.special.entr(self.marginals / counts[:, None]).sum(1)
        scores = (marginal - self.entropies / counts).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def inception_score(
    probabilities: Float[Tensor, "n classes"], *, splits: int
) -> tuple[float, float]:
    """The inception score of images whose probabilities are all at hand, as `InceptionSums` has it.

    Args:
        probabilities: p(y|x) of each image; the rows sum to 1.
        splits: number of nearly equal parts.

    Raises:
        ValueError: there are fewer images than splits, or a row is no distribution.
    """
    num_images, num_classes = probabilities.shape
    sums = InceptionSums(num_images=num_images, splits=splits, num_classes=num_classes)
    sums.update(probabilities, start=0)
    return sums.score()
