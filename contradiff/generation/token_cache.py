"""Keys and values of the cross-attention, computed once for tokens that stay the same."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def keys_and_values_kept(unet: nn.Module) -> Generator[None]:
    """Within the block, do not project the same tokens again at every pass.

    The result is the same, bit for bit. A layer remembers its last input, the very tensor object,
    and computes anew for any other: tokens may change in the block, though not in place.

    Memory, until the block ends: 2 x the cross-attention's widths x tokens x batch; for Stable
    Diffusion, 256 tokens and float32 25 MB a row.

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
            # the instance's own, which hid the class's
            del layer.forward


def _remembering_the_last(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    seen: tuple[Tensor, Tensor] | None = None

    def remember(tokens: Tensor) -> Tensor:
        nonlocal seen
        if seen is None or seen[0] is not tokens:
            seen = tokens, function(tokens)
        return seen[1]

    return remember
