"""A cache of the cross-attention's keys and values, for tokens that are the same at each step."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def cache_keys_and_values(unet: nn.Module) -> Generator[None]:
    """Within the `with` block, compute keys and values only once, not in every pass of the UNet.

    The results are the same, bit for bit. Each layer keeps its last input and output, and computes
    a new output if its input is another tensor object. Tokens must not be changed in place.

    For 256 tokens in float32, the cache of Stable Diffusion takes 25 MB of memory per image.
    """
    ends = ".attn2.to_k", ".attn2.to_v"
    layers = [module for name, module in unet.named_modules() if name.endswith(ends)]
    for layer in layers:
        layer.forward = _remembering_the_last(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # deletes the instance's attribute; the class's method is used again


def _remembering_the_last(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    seen: tuple[Tensor, Tensor] | None = None

    def remember(tokens: Tensor) -> Tensor:
        nonlocal seen
        if seen is None or seen[0] is not tokens:
            seen = tokens, function(tokens)
        return seen[1]

    return remember
