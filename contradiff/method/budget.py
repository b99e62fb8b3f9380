"""Parameters of each module beside the paper's numbers (Tables 3, 7, 9), without any weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from contradiff.base.config import downsampling_of
from contradiff.base.loading import NoiseSchedule, unet_without_weights, vae_without_weights
from contradiff.method.attention import HeadParams
from contradiff.method.conditioner import ConditionerParams
from contradiff.method.lora import LoraParams
from contradiff.method.model import ContraDiff
from contradiff.method.parameter_counts import count_parameters

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
"""What tells Stable Diffusion v1's UNet from others: the paper's base."""

NAMES = {
    "lora": "LoRA",
    "conditioner": "conditional encoder",
    "self_condition": "self-conditioning",
    "attention": "tri-timestep attention",
    "projector": "projector",
}
"""Of the trainable modules, as the paper has them where it has."""

PAPER_CLASSES = 1000
"""ImageNet-1K's: the linear classifier that the paper counts."""

NOTES = """
28M, 68M: with the linear classifier over 1000 classes, which the probe stage trains.
980M, 1048M: the paper's are UNet and CLIP's text encoder, which the method does not use; ours are
UNet and VAE."""
"""Why our numbers differ from the paper's."""


@dataclass(frozen=True)
class Row:
    """A line of the table; None: has no such parameters."""

    name: str
    trainable: int | None = None
    frozen: int | None = None
    paper: str = ""


def parameter_rows(
    folder: Path,
    *,
    lora: LoraParams,
    conditioner: ConditionerParams,
    head: HeadParams,
    image_size: int,
) -> list[Row]:
    """Count the parameters of each module and, on the paper's base, set the paper's sums beside.

    All of it is built on the meta device: this takes seconds, no weights and no network. The paper
    leaves the modules open but for a few sums, by which ours were chosen. The linear classifier,
    which is part of these sums, is listed only beside them: its classes are the paper's 1000.

    Args:
        folder: configuration of the base in diffusers' format.
        lora: rank and targets.
        conditioner: shape of the conditioner.
        head: shapes of attention and projector.
        image_size: side of the images in pixels.

    Raises:
        ValueError: the parameters do not fit this base.
    """
    unet, vae = unet_without_weights(folder), vae_without_weights(folder)
    beside_paper = is_papers_base(unet)
    with torch.device("meta"):
        model = ContraDiff(
            unet,
            NoiseSchedule.of_base(folder),
            lora=lora,
            conditioner=conditioner,
            head=head,
            image_size=image_size,
            downsampling=downsampling_of(folder),
        )
    counts = count_parameters(model, num_vae_parameters=sum(p.numel() for p in vae.parameters()))
    trainable = {name: count for name, (count, _) in counts.modules.items()}
    frozen = {name: count for name, (_, count) in counts.modules.items()}
    classifier = (head.width + 1) * PAPER_CLASSES if beside_paper else 0
    extraction = trainable["attention"] + trainable["projector"] + classifier
    rows = [Row(NAMES[name], trainable[name]) for name in NAMES if name in trainable]
    if beside_paper:
        rows += [Row("linear classifier", classifier)]
    rows += [
        Row("UNet", None, frozen["unet"]),
        Row("VAE", None, frozen["vae"]),
        Row("feature extraction", extraction, None, "28M"),
        Row("sum", counts.trainable + classifier, counts.frozen, "68M, 980M; together 1048M"),
    ]
    if beside_paper:
        return rows
    return [replace(row, paper="") for row in rows]


def is_papers_base(unet: "UNet2DConditionModel") -> bool:
    """Whether a UNet is built as Stable Diffusion v1's, whatever its name."""
    # from_config keeps lists or makes tuples of them, as the file or the default has them
    given = {key: unet.config[key] for key in PAPER_UNET}
    return all(
        list(given[key]) == value if isinstance(value, list) else given[key] == value
        for key, value in PAPER_UNET.items()
    )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text, and under the paper's numbers why ours differ."""
    beside_paper = any(row.paper for row in rows)
    lines = [_line("parameters", "trainable", "frozen", "paper" if beside_paper else "")]
    lines += [_line(row.name, _shown(row.trainable), _shown(row.frozen), row.paper) for row in rows]
    together = (rows[-1].trainable or 0) + (rows[-1].frozen or 0)
    lines += ["", f"Trainable and frozen together: {together:,}."]
    return "\n".join([*lines, *([NOTES.lstrip()] if beside_paper else [])])


def _line(name: str, trainable: str, frozen: str, paper: str) -> str:
    return f"{name:22}  {trainable:>14}  {frozen:>14}  {paper}".rstrip()


def _shown(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
