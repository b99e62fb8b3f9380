"""The low-rank updates (LoRA) that adapt the frozen UNet's cross-attention."""

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn

from contradiff.config import Section

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


class LoraParams(Section):
    """Section `lora` (paper: rank 16 in the cross-attention's q, k, v)."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0, description="the update is scaled by alpha / rank")
    targets: list[str] = Field(min_length=1, description="suffixes of the UNet's linear layers")


def add_lora(unet: "UNet2DConditionModel", *, rank: int, alpha: float, targets: list[str]) -> None:
    """Insert trainable low-rank updates in place; they start as the identity (B = 0)."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, unet)
    adapted = [name for name, _ in unet.named_modules() if name.endswith(".lora_A")]
    assert all(any(f"{target}.lora_A" in name for name in adapted) for target in targets)


def merge_lora(unet: nn.Module) -> None:
    """Fold the low-rank updates into the weights, in float32: the same function, no extra cost."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=False)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def disable_lora(unet: nn.Module) -> None:
    """Leave the low-rank updates out, for good: the base's own function."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(enabled=False)  # pyright: ignore[reportUnknownMemberType]


def cast_frozen_weights(unet: nn.Module) -> None:
    """Make the frozen weights of matrix products and convolutions bfloat16, once and for all.

    Autocast would do so at every pass, to the same values, and keep a copy for the backward pass
    beside the float32 ones. Norms' weights stay float32, in which autocast takes them on CUDA, and
    so does what is trained.
    """
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
