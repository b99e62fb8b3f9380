"""Trainable and frozen parameters, counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from contradiff.method.model import TRAINED_PARTS, ContraDiff


@dataclass(frozen=True)
class ParameterCounts:
    """Trainable and frozen parameters of each module (Tables 3, 7, 9)."""

    modules: Mapping[str, tuple[int, int]]

    @property
    def trainable(self) -> int:
        """Sum over modules."""
        return sum(trainable for trainable, _ in self.modules.values())

    @property
    def frozen(self) -> int:
        """Sum over modules; with the VAE where it was counted."""
        return sum(frozen for _, frozen in self.modules.values())

    def to_json(self) -> dict[str, Any]:
        """As stored in a checkpoint's config.json and shown in reports."""
        modules = {name: list(counts) for name, counts in self.modules.items()}
        return {"trainable": self.trainable, "frozen": self.frozen, "modules": modules}


def count_parameters(model: ContraDiff, *, num_vae_parameters: int) -> ParameterCounts:
    """Count the parameters; LoRA stands apart from the UNet that it adapts."""
    modules: dict[str, tuple[int, int]] = {}
    lora = sum(p.numel() for name, p in model.unet.named_parameters() if "lora_" in name)
    unet = sum(p.numel() for p in model.unet.parameters()) - lora
    modules["unet"] = (0, unet)
    modules["vae"] = (0, num_vae_parameters)
    modules["lora"] = (lora, 0)
    for name in TRAINED_PARTS:
        part: nn.Module | None = getattr(model, name)
        if part is not None:
            modules[name] = (sum(p.numel() for p in part.parameters()), 0)
    return ParameterCounts(modules)
