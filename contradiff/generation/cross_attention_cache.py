"""A cache of the cross-attention's keys and values, for tokens that stay the same."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def cache_keys_and_values(unet: nn.Module) -> Generator[None]:
    """Compute keys and values once within the block, and not in every pass.

    The result is the same, bit for bit. Each layer remembers its last input and output, and
    computes again when the input is another tensor object. Tokens must not be changed in place.

    An image of Stable Diffusion with 256 tokens in float32 takes 25 MB until the block ends.
    """
    ends = ".attn2.to_k", ".attn2.to_v"
    layers = [module for name, module in unet.named_modules() if name.endswith(ends)]
    for layer in layers:
        layer.forward = _remembering_the_last(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the instance's own, which hid the class's


def _remembering_the_last(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    seen: tuple[Tensor, Tensor] | None = None

    def remember(tokens: Tensor) -> Tensor:
        nonlocal seen
        if seen is None or seen[0] is not tokens:
            seen = tokens, function(tokens)
        return seen[1]

    return remember
