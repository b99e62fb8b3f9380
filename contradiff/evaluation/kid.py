"""The kernel distance of two sets of features, called KID (Bińkowski et al., 2018).

features (n d) of both sets => clean-fid's squared MMD of random subsets => mean and deviation
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor


def kid(
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    *,
    num_subsets: int,
    subset_size: int,
    seed: int,
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x·y/d + 1)³, over random subsets, in float64.

    Its expectation does not depend on the number of images, unlike that of the FID. It may come out
    slightly below 0. clean-fid computes it; torch-fidelity draws the same subsets for this seed.

    Returns:
        The mean and the population deviation over the subsets.

    Raises:
        ValueError: a set is smaller than a subset.
    """
    from cleanfid.fid import kernel_distance

    check_subset_size(subset_size, num_kept=min(len(samples), len(reference)))
    # clean-fid draws from NumPy's global generator, and draws of its second argument first.
    x, y = reference.double().cpu().numpy(), samples.double().cpu().numpy()
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        # It returns the mean alone; the deviation needs every subset.
        estimates = [
            kernel_distance(x, y, num_subsets=1, max_subset_size=subset_size)
            for _ in range(num_subsets)
        ]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return float(np.mean(estimates)), float(np.std(estimates))


def check_subset_size(subset_size: int, *, num_kept: int) -> None:
    """Raise a ValueError if subsets are larger than the smaller set of features."""
    if subset_size > num_kept:
        raise ValueError(
            f"score.kid_subset_size is {subset_size}; it may be {num_kept} at most, the number of "
            "images whose features are kept: lower it, or raise reference.num_kept, "
            "generate.num_samples or data.num_val"
        )
