"""The parameters of each module, counted, and shown beside the paper's numbers (Tables 3, 7, 9)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from contradiff.base.config import downsampling_of
from contradiff.base.loading import NoiseSchedule, unet_without_weights, vae_without_weights
from contradiff.method.model import TRAINED_MODULES, Architecture, ContraDiff

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

PAPER_UNET: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "use_linear_projection": False,
}
"""The configuration of Stable Diffusion v1's UNet, the paper's base."""

NAMES = {
    "lora": "LoRA",
    "conditioner": "conditional encoder",
    "self_condition": "self-conditioning",
    "attention": "tri-timestep attention",
    "projector": "projector",
    "unet": "UNet",
    "vae": "VAE",
}
"""The paper's names of the modules, where it has any."""

PAPER_CLASSES = 1000
"""ImageNet-1K's classes: the paper counts a linear classifier over them."""

NOTES = """
28M and 68M hold the linear classifier over 1000 classes, which the probe stage trains.
The paper's 980M and 1048M are UNet and CLIP's text encoder, which the method does not use; ours are
UNet and VAE."""


class ParameterCounts(TypedDict):
    """How many parameters learn and how many are frozen, in all and as a pair for each module."""

    trainable: int
    frozen: int
    modules: dict[str, tuple[int, int]]


def count_parameters(model: ContraDiff, *, num_vae_parameters: int) -> ParameterCounts:
    """Count the parameters; LoRA stands apart from the UNet that it adapts."""
    lora = sum(p.numel() for name, p in model.unet.named_parameters() if "lora_" in name)
    modules = {
        "unet": (0, _size(model.unet) - lora),
        "vae": (0, num_vae_parameters),
        "lora": (lora, 0),
    }
    for name in TRAINED_MODULES:
        module: nn.Module | None = getattr(model, name)
        if module is not None:
            modules[name] = (_size(module), 0)
    trainable, frozen = (sum(pair) for pair in zip(*modules.values(), strict=True))
    return {"trainable": trainable, "frozen": frozen, "modules": modules}


def parameter_table(folder: Path, architecture: Architecture, *, image_size: int) -> str:
    """Show the parameters of each module and, on the paper's base, the paper's sums beside them.

    Everything is built on the meta device: this takes seconds and needs neither weights nor
    network. The paper gives only a few sums, by which our modules were chosen. They hold the linear
    classifier over the paper's 1000 classes, so it has a line there.

    Args:
        folder: configuration of the base in diffusers' format.
        architecture: LoRA's rank and targets, shapes of the modules.
        image_size: side of the images in pixels.

    Raises:
        ValueError: the parameters do not fit this base.
    """
    unet = unet_without_weights(folder)
    is_papers = is_papers_base(unet)
    with torch.device("meta"):
        model = ContraDiff(
            unet,
            NoiseSchedule.of_base(folder),
            architecture,
            image_size=image_size,
            downsampling=downsampling_of(folder),
        )
    counts = count_parameters(model, num_vae_parameters=_size(vae_without_weights(folder)))
    modules = counts["modules"]
    classifier = (architecture.head.width + 1) * PAPER_CLASSES if is_papers else 0
    trainable, frozen = counts["trainable"] + classifier, counts["frozen"]
    extraction = modules["attention"][0] + modules["projector"][0] + classifier

    lines = [_line("parameters", "trainable", "frozen", "paper" if is_papers else "")]
    lines += [_line(NAMES[n], modules[n][0]) for n in NAMES if n in modules and modules[n][0]]
    lines += [_line("linear classifier", classifier)] if is_papers else []
    lines += [_line(NAMES[name], "", modules[name][1]) for name in ("unet", "vae")]
    lines += [
        _line("feature extraction", extraction, "", "28M" if is_papers else ""),
        _line("sum", trainable, frozen, "68M, 980M; together 1048M" if is_papers else ""),
        "",
        f"Trainable and frozen together: {trainable + frozen:,}.",
    ]
    return "\n".join([*lines, *([NOTES.lstrip()] if is_papers else [])])


def is_papers_base(unet: "UNet2DConditionModel") -> bool:
    """Whether a UNet is built as Stable Diffusion v1's, whatever its name."""
    # from_config keeps lists or makes tuples of them, as the file or the default has them
    given = {key: unet.config[key] for key in PAPER_UNET}
    return all(
        list(given[key]) == value if isinstance(value, list) else given[key] == value
        for key, value in PAPER_UNET.items()
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _line(name: str, trainable: int | str, frozen: int | str = "", paper: str = "") -> str:
    shown = (f"{n:,}" if isinstance(n, int) else n for n in (trainable, frozen))
    return "  ".join([f"{name:22}", *(f"{n:>14}" for n in shown), paper]).rstrip()
