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


def add_lora(unet: "UNet2DConditionModel", params: LoraParams) -> None:
    """Insert trainable low-rank updates in place; they start as the identity (B = 0)."""
    from peft import LoraConfig, inject_adapter_in_model

    rank, alpha, targets = params.rank, params.alpha, params.targets
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, unet)
    adapted = [name for name, _ in unet.named_modules() if name.endswith(".lora_A")]
    assert all(any(f"{target}.lora_A" in name for name in adapted) for target in targets)


def merge_lora(unet: nn.Module) -> None:
    """Add the low-rank updates to the weights (float32): same output, no more LoRA overhead."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=False)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def disable_lora(unet: nn.Module) -> None:
    """Switch the low-rank updates off, so that the UNet computes what the base computes."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(enabled=False)  # pyright: ignore[reportUnknownMemberType]


def cast_frozen_weights(unet: nn.Module) -> None:
    """Convert the frozen weights of linear layers and convolutions to bfloat16.

    Autocast would convert them to the same values in every pass, and would keep these copies beside
    the float32 weights until the backward pass. Norms, which autocast runs in float32 on CUDA, and
    trainable weights stay float32.
    """
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
