"""The linear classifier of frozen features, whichever method trained it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LinearProbe(nn.Module):
    """BatchNorm without affine parameters, as in MAE's probe, then a linear layer.

    Thanks to BatchNorm, the best learning rate does not depend on the scale of the features. The
    argument `generator` draws the initial weights, with standard deviation 0.01.
    """

    def __init__(
        self, dim: int, num_classes: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        # Without this line, nn.Linear's own initialisation would draw from the global generator.
        with torch.random.fork_rng(devices=[]):
            self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Compute logits from features that are not normalised."""
        return self.linear(self.norm(features))
