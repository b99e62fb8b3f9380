"""One training step, features and a sample with Stable Diffusion v1.4's own configuration.

Weights are random. The default suite runs the same test on a shrunken copy of the configuration.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from contradiff.base.config import downsampling_of
from contradiff.base.loading import NoiseSchedule, load_scheduler
from contradiff.base.vae import decode_latents
from contradiff.config import parse, read_params
from contradiff.generation.sampling import denoise
from contradiff.method.checkpoint import Architecture
from contradiff.method.losses import LossParams
from contradiff.method.model import ContraDiff
from contradiff.method.objective import TrainingBatch, TrainingStep
from contradiff.training.optim import build_adamw

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 2


@dataclass(frozen=True)
class Scale:
    """Configuration of the base as it is published, but for `unet` and `vae`; and the shapes."""

    image_size: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    head: dict[str, Any]
    bottleneck: tuple[int, int, int]


FULL = Scale(image_size=256, unet={}, vae={}, head={}, bottleneck=(1280, 4, 4))
SHRUNKEN = Scale(
    image_size=128,
    unet={"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 48},
    vae={"block_out_channels": [32, 32, 32, 32]},
    head={"width": 32, "num_heads": 4, "projector_width": 32, "projector_out": 16},
    bottleneck=(64, 2, 2),
)


def base_of(scale: Scale, folder: Path) -> Path:
    """The configuration files alone."""
    shutil.copytree(ROOT / "presets" / "stable-diffusion-v1-4", folder)
    for part, changes in (("unet", scale.unet), ("vae", scale.vae)):
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def digests(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: crc32(t.detach().contiguous().numpy()) for name, t in tensors.items()}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_batch(model: ContraDiff, latent_shape: tuple[int, int, int]) -> TrainingBatch:
    timesteps = torch.tensor([[[101, 650], [401, 30], [201, 333]], [[5, 900], [77, 444], [310, 2]]])
    return TrainingBatch(
        latents=draw(NUM_IMAGES, *latent_shape, seed=3).expand(2, -1, -1, -1, -1),
        conditions=draw(1, NUM_IMAGES, *model.conditioner.shape, seed=1),
        condition_noise=draw(1, NUM_IMAGES, *model.conditioner.shape, seed=2),
        dropped=torch.tensor([[False, True]]),
        timesteps=timesteps,
        noise=draw(2, 3, NUM_IMAGES, *latent_shape, seed=4),
    )


def build(scale: Scale, base: Path, params: Architecture) -> tuple[ContraDiff, AutoencoderKL]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = of_config(UNet2DConditionModel, base / "unet")
        vae = of_config(AutoencoderKL, base / "vae")
        model = ContraDiff(
            unet,
            NoiseSchedule.of_base(base),
            params,
            image_size=scale.image_size,
            downsampling=downsampling_of(base),
        )
        # What starts at zero would hide other parts' gradients.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.02)
    return model, vae


def of_config(kind: Any, folder: Path) -> Any:
    module: nn.Module = kind.from_config(json.loads((folder / "config.json").read_text()))
    return module.requires_grad_(requires_grad=False).eval()


def check_training_step(
    model: ContraDiff, vae: AutoencoderKL, batch: TrainingBatch, loss: LossParams, *, bf16: bool
) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= {f"vae.{name}": p for name, p in vae.named_parameters()}
    in_unet = [name for name in trainable if name.startswith("unet.")]
    assert all("lora_" in name for name in in_unet)
    # v1's UNet has 16 cross-attentions: A and B of q, k, v.
    assert len(in_unet) == 16 * 3 * 2
    parts = {name.partition(".")[0] for name in trainable}
    assert parts == {"unet", "conditioner", "attention", "projector"}
    trainable_before, frozen_before = digests(trainable), digests(frozen)

    optimizer = build_adamw(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    step = TrainingStep(model, loss=loss, decode_batch_size=1).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = step(batch)
    losses["loss"].backward()
    assert set(losses) == {"loss", "reconstruction", "contrastive"}
    assert all(torch.isfinite(value) for value in losses.values())
    # LoRA's A and B among them
    idle = [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert [name for name, p in frozen.items() if p.grad is not None] == []

    optimizer.step()
    trainable_after = digests(trainable)
    unchanged = [name for name in trainable if trainable_after[name] == trainable_before[name]]
    assert unchanged == []
    assert digests(frozen) == frozen_before


@torch.inference_mode()
def check_features(
    model: ContraDiff, latent_shape: tuple[int, int, int], scale: Scale, *, width: int
) -> None:
    maps = model.level_maps(
        draw(NUM_IMAGES, *latent_shape, seed=6),
        model.encode_condition(draw(NUM_IMAGES, *model.conditioner.shape, seed=5)),
        timesteps=[401, 201, 101],
        noise=draw(3, NUM_IMAGES, *latent_shape, seed=7),
        blocks=["mid"],
    )["mid"]
    assert maps.shape == (NUM_IMAGES, 3, *scale.bottleneck)
    features = model.attention(maps)
    assert features.shape == (NUM_IMAGES, width)
    assert torch.isfinite(features).all()
    assert not torch.equal(features[0], features[1])


@torch.inference_mode()
def check_sampling_step(
    model: ContraDiff,
    vae: AutoencoderKL,
    base: Path,
    latent_shape: tuple[int, int, int],
    scale: Scale,
) -> None:
    latents = draw(NUM_IMAGES, *latent_shape, seed=8)
    tokens = model.encode_condition(draw(NUM_IMAGES, *model.conditioner.shape, seed=9))
    clean = denoise(model, load_scheduler(base, num_inference_steps=1), latents, tokens)
    assert clean.shape == latents.shape
    assert torch.isfinite(clean).all()
    assert not torch.equal(clean, latents)
    images = decode_latents(vae, clean[:1])
    assert images.shape == (1, 3, scale.image_size, scale.image_size)


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(SHRUNKEN, id="shrunken"),
        pytest.param(FULL, id="full", marks=pytest.mark.slow),
    ],
)
def test_a_step_features_and_a_sample_on_the_papers_base(scale: Scale, tmp_path: Path):
    base = base_of(scale, tmp_path / "base")
    content = read_params(ROOT / "presets/paper.yaml")
    content["head"] |= scale.head
    params = parse(Architecture, content, source="paper.yaml")
    loss = LossParams.model_validate(content["loss"])
    assert loss.weight > 0
    model, vae = build(scale, base, params)
    side = scale.image_size // 8
    latent_shape = (4, side, side)
    # bfloat16 as in training; at full size float32, since most CPUs only emulate bfloat16
    batch = draw_batch(model, latent_shape)
    check_training_step(model, vae, batch, loss, bf16=scale is SHRUNKEN)
    model.eval()
    check_features(model, latent_shape, scale, width=params.head.width)
    check_sampling_step(model, vae, base, latent_shape, scale)
