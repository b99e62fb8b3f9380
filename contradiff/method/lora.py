"""The low-rank updates (LoRA) that adapt the frozen UNet's cross-attention."""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contradiff.method.params import LoraParams

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def add_lora(unet: "UNet2DConditionModel", params: LoraParams) -> None:
    """Add trainable low-rank updates to layers of `unet`, in place. The updates start at zero."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    from contradiff.method.lora_layer import LinearWithLora

    rank, alpha, targets = params.rank, params.alpha, params.targets
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, unet)
    for module in unet.modules():
        if type(module) is Linear:
            module.__class__ = LinearWithLora
    adapted = [name for name, _ in unet.named_modules() if name.endswith(".lora_A")]
    assert all(any(f"{target}.lora_A" in name for name in adapted) for target in targets)


def merge_lora(unet: nn.Module) -> None:
    """Add the low-rank updates to the float32 weights, so that the UNet needs less time."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=False)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def disable_lora(unet: nn.Module) -> None:
    """Switch the low-rank updates off, so that the UNet gives the outputs of the base again."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(enabled=False)  # pyright: ignore[reportUnknownMemberType]


def cast_frozen_weights(unet: nn.Module) -> None:
    """Convert the frozen weights to bfloat16, for passes under autocast.

    For linear layers and convolutions, autocast gives the same values, but takes more time and
    memory: it converts the weights in every pass, and keeps both versions until the backward pass.
    Norms get and return bfloat16, too; autocast would give float32 to the layers behind them, which
    convert it back. They compute in float32 inside. Trainable weights stay float32.
    """
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):  # do not convert inputs to LoRA's float32: autocast would
            module.cast_input_dtype_enabled = False  # at once convert them back
        if isinstance(module, _FROZEN) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.__class__ = _in_bfloat16(type(module))


_FROZEN = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm


class _InBFloat16(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        with torch.autocast(tensor.device.type, enabled=False):
            return super().forward(tensor.bfloat16())


@cache
def _in_bfloat16(norm: type[Any]) -> type[Any]:
    """Return a class of norms, not a function for each norm: compiled blocks can share it."""
    return type(norm.__name__, (_InBFloat16, norm), {})
