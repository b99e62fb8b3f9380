"""Counts of each module's parameters, compared with the paper's numbers (Tables 3, 7, 9)."""

from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from contradiff.base.config import downsampling_of
from contradiff.base.loading import NoiseSchedule, unet_without_weights, vae_without_weights
from contradiff.method.model import TRAINED_MODULES, ContraDiffModel
from contradiff.method.params import Architecture

PAPER_UNET_SIZE = 859_520_964
"""Parameter count of Stable Diffusion v1's UNet. A base with this count is the paper's base."""

NAMES = {
    "lora": "LoRA",
    "conditioner": "conditional encoder",
    "self_condition": "self-conditioning",
    "attention": "tri-timestep attention",
    "projector": "projector",
}
"""Names of the trained modules in the table. Most are the paper's names."""

NOTES = """
28M and 68M include the linear classifier over 1000 classes, which the stage `probe` trains.
The paper's frozen 980M are the UNet and CLIP's text encoder. The method does not use the text
encoder, so our frozen parameters are the UNet and the VAE."""


class ParameterCounts(TypedDict):
    """Numbers of trainable and frozen parameters: in total, and as a pair for each module."""

    trainable: int
    frozen: int
    modules: dict[str, tuple[int, int]]


def count_parameters(model: ContraDiffModel, *, num_vae_parameters: int) -> ParameterCounts:
    """Count the parameters of each module. LoRA counts as a module of its own."""
    lora = sum(p.numel() for name, p in model.unet.named_parameters() if "lora_" in name)
    unet = _size(model.unet) - lora
    modules = {"unet": (0, unet), "vae": (0, num_vae_parameters), "lora": (lora, 0)}
    for name in TRAINED_MODULES:
        module: nn.Module | None = getattr(model, name)
        if module is not None:
            modules[name] = (_size(module), 0)
    trainable, frozen = (sum(pair) for pair in zip(*modules.values(), strict=True))
    return {"trainable": trainable, "frozen": frozen, "modules": modules}


def parameter_table(folder: Path, architecture: Architecture, *, image_size: int) -> str:
    """Return a table of parameter counts. For the paper's base, it also has the paper's counts.

    No weights are needed. The paper's sums include a linear classifier over 1000 classes, so the
    table for the paper's base has a line for this classifier.
    """
    unet, schedule = unet_without_weights(folder), NoiseSchedule.of_base(folder)
    is_papers, factor = _size(unet) == PAPER_UNET_SIZE, downsampling_of(folder)
    with torch.device("meta"):
        model = ContraDiffModel(
            unet, schedule, architecture, image_size=image_size, downsampling=factor
        )
    counts = count_parameters(model, num_vae_parameters=_size(vae_without_weights(folder)))
    modules = counts["modules"]
    classifier = (architecture.head.width + 1) * 1000 if is_papers else 0
    trainable, frozen = counts["trainable"] + classifier, counts["frozen"]
    extraction = modules["attention"][0] + modules["projector"][0] + classifier
    papers = ("paper", "28M", "68M, 980M; together 1048M") if is_papers else ("", "", "")

    rows: list[tuple[str, int | str, int | str, str]] = [
        ("parameters", "trainable", "frozen", papers[0]),
        *((NAMES[name], modules[name][0], "", "") for name in NAMES if name in modules),
        *([("linear classifier", classifier, "", "")] if is_papers else []),
        *((name, "", modules[key][1], "") for key, name in (("unet", "UNet"), ("vae", "VAE"))),
        ("feature extraction", extraction, "", papers[1]),
        ("sum", trainable, frozen, papers[2]),
    ]
    together = f"\nTrainable and frozen together: {trainable + frozen:,}."
    return "\n".join([*map(_line, rows), together, *([NOTES.lstrip()] if is_papers else [])])


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _line(row: tuple[str, int | str, int | str, str]) -> str:
    name, *numbers, paper = row
    shown = (f"{n:,}" if isinstance(n, int) else n for n in numbers)
    return "  ".join([f"{name:22}", *(f"{n:>14}" for n in shown), paper]).rstrip()
