"""Training step, features and sample of a random Stable Diffusion v1.4; by default a small copy."""

import json
import shutil
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
from contradiff.method.model import ContraDiffModel
from contradiff.method.objective import TrainingBatch, TrainingStep
from contradiff.method.params import Architecture, LossParams
from contradiff.training.optim import build_adamw

ROOT = Path(__file__).resolve().parents[2]
SHRUNKEN: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 48},
    "vae": {"block_out_channels": [32, 32, 32, 32]},
    "conditioner": {"width": 64},
    "head": {"width": 32, "num_heads": 4, "projector_width": 32, "projector_out": 16},
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_config(kind: Any, folder: Path) -> Any:
    module: nn.Module = kind.from_config(json.loads((folder / "config.json").read_text()))
    return module.requires_grad_(requires_grad=False).eval()


def digests(model: nn.Module, *, trainable: bool) -> dict[str, int]:
    named = model.named_parameters()
    chosen = {name: p.detach() for name, p in named if p.requires_grad == trainable}
    return {name: crc32(p.contiguous().numpy()) for name, p in chosen.items()}


def check_training_step(
    model: ContraDiffModel, batch: TrainingBatch, loss: LossParams, *, bf16: bool
) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The UNet has 16 cross-attention layers. In each, q, k and v have LoRA's A and B.
    assert sum("lora_" in name for name in trainable if name.startswith("unet.")) == 16 * 3 * 2
    parts = {name.partition(".")[0] for name in trainable}
    assert parts == {"unet", "conditioner", "attention", "projector"}
    before, frozen = digests(model, trainable=True), digests(model, trainable=False)
    optimizer = build_adamw(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = TrainingStep(model, loss=loss, decode_batch_size=1).train()(batch)
    losses["loss"].backward()
    assert set(losses) == {"loss", "reconstruction", "contrastive"}
    assert all(torch.isfinite(value) for value in losses.values())
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.any()] == []
    optimizer.step()
    after = digests(model, trainable=True)
    assert [name for name in before if after[name] == before[name]] == []
    assert digests(model, trainable=False) == frozen


@pytest.mark.parametrize(
    ("image_size", "changes", "bottleneck"),
    [
        pytest.param(128, SHRUNKEN, (64, 2, 2), id="shrunken"),
        pytest.param(256, {}, (1280, 4, 4), id="full", marks=pytest.mark.slow),
    ],
)
def test_a_step_features_and_a_sample_on_the_papers_base(
    image_size: int, changes: dict[str, dict[str, Any]], bottleneck: tuple[int, ...], tmp_path: Path
):
    base = Path(shutil.copytree(ROOT / "presets/stable-diffusion-v1-4", tmp_path / "base"))
    for part in ("unet", "vae"):
        path = base / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes.get(part, {})))
    content = read_params(ROOT / "presets/paper.yaml")
    for section in ("conditioner", "head"):
        content[section] |= changes.get(section, {})
    params = parse(Architecture, content, source="paper.yaml")
    loss, schedule = LossParams.model_validate(content["loss"]), NoiseSchedule.of_base(base)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        unet = of_config(UNet2DConditionModel, base / "unet")
        vae = of_config(AutoencoderKL, base / "vae")
        sizes = {"image_size": image_size, "downsampling": downsampling_of(base)}
        model = ContraDiffModel(unet, schedule, params, **sizes)
        for parameter in model.parameters():
            # Weights that start at zero would make other gradients zero.
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    latent, image = (2, 4, image_size // 8, image_size // 8), (2, *model.conditioner.shape)
    timesteps = torch.tensor([[[101, 650], [401, 30], [201, 333]], [[5, 900], [77, 444], [310, 2]]])
    batch = TrainingBatch(
        latents=draw(*latent, seed=3).expand(2, -1, -1, -1, -1),
        conditions=draw(1, *image, seed=1),
        condition_noise=draw(1, *image, seed=2),
        dropped=torch.tensor([[False, True]]),
        timesteps=timesteps,
        noise=draw(2, 3, *latent, seed=4),
    )
    # bfloat16 as in training, but float32 at full size: most CPUs only emulate bfloat16
    check_training_step(model, batch, loss, bf16=bool(changes))
    model.eval()
    with torch.inference_mode():
        tokens, options = model.encode_condition(draw(*image, seed=5)), {"blocks": ["mid"]}
        options |= {"timesteps": [401, 201, 101], "noise": draw(3, *latent, seed=7)}
        maps = model.level_maps(draw(*latent, seed=6), tokens, **options)["mid"]
        assert maps.shape == (2, 3, *bottleneck)
        features = model.attention(maps)
        assert features.shape == (2, params.head.width)
        assert torch.isfinite(features).all()
        assert not torch.equal(*features)
        latents = draw(*latent, seed=8)
        clean = denoise(model, load_scheduler(base, num_inference_steps=1), latents, tokens)
        assert clean.shape == latents.shape
        assert torch.isfinite(clean).all()
        assert not torch.equal(clean, latents)
        assert decode_latents(vae, clean[:1]).shape == (1, 3, image_size, image_size)
