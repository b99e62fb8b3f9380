"""torch.compile for the blocks of the UNet, which take most of the time on a GPU."""

import torch
from torch import nn

BLOCKS = ("ResnetBlock2D", "Transformer2DModel")
"""Names of diffusers' classes. Blocks with equal shapes share their compiled code."""


def compile_blocks(unet: nn.Module) -> None:
    """Let torch compile each resnet and transformer block when it is first called; return at once.

    Compilation fuses norms, activations and casts with what follows, and gives the same results up
    to rounding. It takes a minute or more, and as long again for another batch size. The blocks
    are stored channels last, which is what compiled convolutions read fastest.
    """
    from torch._dynamo import config

    # torch counts a recompilation for each shape of a block, and by default gives up after eight.
    config.recompile_limit = max(config.recompile_limit, 256)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4096)
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for module in unet.modules():
        if type(module).__name__ in BLOCKS:
            # Static shapes: blocks differ in theirs, which torch would take for a changing shape.
            module.compile(dynamic=False)
