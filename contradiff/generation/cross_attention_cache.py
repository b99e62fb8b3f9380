"""Keys and values of the cross-attention, computed once for tokens that stay the same."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def cache_keys_and_values(unet: nn.Module) -> Generator[None]:
    """Project the same tokens once within the block, not at every pass.

    The result is the same, bit for bit. Each layer remembers its last input, the very tensor
    object, and computes anew for any other: tokens may change in the block, but not in place.

    The memory is freed when the block ends. It is 2 x the cross-attention's widths x tokens x
    batch: 25 MB a row for Stable Diffusion, 256 tokens and float32.

    Args:
        unet: denoiser, LoRA merged or not.
    """
    layers = [
        module
        for name, module in unet.named_modules()
        if name.endswith((".attn2.to_k", ".attn2.to_v"))
    ]
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
