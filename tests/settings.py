"""Parameter sections that many tests start from."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from torch import nn

from contradiff.config import read_params
from contradiff.features.params import FeaturesParams

TINY: dict[str, Any] = read_params(Path(__file__).resolve().parents[1] / "presets/tiny.yaml")
GENERATE = TINY["generate"] | {"num_samples": 5, "num_inference_steps": 2, "batch_size": 4}
LATENTS = TINY["latents"] | {"views": 3, "colour_jitter": 0.0, "min_psnr": 0.0, "batch_size": 24}
LATENTS |= {"dtype": "float16"}
"""The parameters with which the fixture `tiny_data` was made."""
ARCHITECTURE: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 4.0, "targets": ["attn2.to_q", "attn2.to_k", "attn2.to_v"]},
    "conditioner": {
        "input": "pixels",
        "patch_size": 8,
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "drop": 0.1,
        "cond_view": "same",
    },
    "head": {
        "block": "mid",
        "self_conditioning": False,
        "width": 16,
        "num_heads": 2,
        "mlp_ratio": 2,
        "residual": "value",
        "init": "identity",
        "projector_width": 12,
        "projector_out": 8,
    },
}
"""Sections of a small ContraDiff on `tiny_base`; a trained project's checkpoint has them."""

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[:-1],
    "grown": lambda content: content + b"x",
    "a bit": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
}
"""Ways to damage a file whose digest is known."""


def features_params(**changes: Any) -> FeaturesParams:
    """Return the section `features` of the embedded default, with batch size 8 and changes."""
    return FeaturesParams.model_validate(TINY["features"] | {"batch_size": 8} | changes)


def override(content: dict[str, Any], changes: str) -> None:
    """Change parameters like `dvc exp run -S`; `changes` is such as "seed=1 lora.rank=4"."""
    for change in changes.split():
        key, _, text = change.partition("=")
        section, _, name = key.rpartition(".")
        place = content[section] if section else content
        assert name in place, f"{key} is no parameter"
        place[name] = YAML(typ="safe").load(StringIO(text))


def write_tiny_base(folder: Path) -> None:
    """Write a random base: 32 pixels, 8x8x4 latents, 2x2x32 bottleneck, attention as in SD."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from contradiff.toy.base_recipe import build_scheduler

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.5,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    vae.save_pretrained(folder / "vae")
    unet.save_pretrained(folder / "unet")
    build_scheduler().save_pretrained(folder / "scheduler")


def norms_in_bfloat16(unet: nn.Module) -> None:
    """Let only the norms run in bfloat16: on the CPU, autocast does not change their inputs."""
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.to(torch.bfloat16)
            module.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
