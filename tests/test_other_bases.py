"""Bases unlike the paper's: other UNets, predictions of v, and other spacings of timesteps.

What is expected comes from diffusers: its own passes of the UNet, schedulers, and pipeline.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr
from torch import Tensor

from contradiff.base.config import check_base
from contradiff.base.weights import check_weights
from contradiff.features.inversion import inverted_maps
from contradiff.features.params import CHAIN_STEPS
from contradiff.generation.sampling import denoise
from contradiff.generation.solvers import load_solver
from contradiff.method.model import ContraDiffModel, build_model
from contradiff.method.objective import TrainingStep
from contradiff.method.params import Architecture
from contradiff.pretrained.folder import write_lora
from tests.method.batches import draw_batch, loss_params, watch_maps
from tests.settings import ARCHITECTURE

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
V_PREDICTION = {"prediction_type": "v_prediction"}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (16, 32, 32), "down_block_types": (CROSS, CROSS, PLAIN)},
    "sd2": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": (CROSS, CROSS, PLAIN),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
        "cross_attention_dim": 24,
    },
    "two levels": {
        "block_out_channels": (16, 32),
        "down_block_types": (PLAIN, CROSS),
        "layers_per_block": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "mid_block_type": "UNetMidBlock2D",
    },
    "four levels": {
        "block_out_channels": (8, 16, 16, 24),
        "down_block_types": (CROSS, CROSS, PLAIN, CROSS),
        "time_embedding_dim": 40,
    },
}
BASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "sd1": ("sd1", {}, 5),
    "sd2": ("sd2", V_PREDICTION, 5),
    "two levels, trailing": ("two levels", {"timestep_spacing": "trailing"}, 5),
    # Only as many steps as there are timesteps are even with "linspace".
    "four levels, linspace": (
        "four levels",
        {"timestep_spacing": "linspace", "num_train_timesteps": 20},
        20,
    ),
    "zero SNR": (
        "sd2",
        V_PREDICTION | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        5,
    ),
}
"""Name => the UNet's shape, settings of the scheduler, and a number of DDIM steps."""

Base = tuple[Path, ContraDiffModel, int]


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A folder of a random base, a ContraDiff on it with random LoRA, and a number of steps."""
    shape, scheduler, num_steps = BASES[request.param]
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        down = UNETS[shape]["down_block_types"]
        unet = {
            "up_block_types": tuple(name.replace("Down", "Up") for name in down[::-1]),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **UNETS[shape],
        }
        UNet2DConditionModel(sample_size=8, **unet).save_pretrained(folder / "unet")
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            scaling_factor=0.13,
        )
        vae.save_pretrained(folder / "vae")
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        off = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        DDIMScheduler(**(betas | off | scheduler)).save_pretrained(folder / "scheduler")
        check_base(folder)
        check_weights(folder)
        sections = ARCHITECTURE | {"head": ARCHITECTURE["head"] | {"self_conditioning": True}}
        shapes = Architecture.model_validate(sections)
        model = build_model(folder, shapes, image_size=32, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not (parameter.any() or "self_condition" in name):
                    parameter.normal_(std=0.2)
    return folder, model.eval(), num_steps


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_that_of_diffusers_training_script(base: Base):
    """Its terms: `add_noise`, `get_velocity`, `compute_snr`; weights as for `--snr_gamma`."""
    folder, model, _ = base
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    last, batch = len(scheduler.alphas_cumprod) - 1, draw_batch(3)
    timesteps = batch.timesteps % (last + 1)
    timesteps[0, 0, 0] = last
    batch = type(batch)(**(vars(batch) | {"timesteps": timesteps}))
    is_v = scheduler.config["prediction_type"] == "v_prediction"
    errors: dict[float, list[Tensor]] = {}
    with torch.no_grad():
        for view in range(2):
            shown = torch.stack(
                [
                    (batch.condition_noise if batch.dropped[view, i] else batch.conditions)[view, i]
                    for i in range(3)
                ]
            )
            tokens = model.conditioner(shown)
            for level in range(3):
                noise, steps = batch.noise[view, level], batch.timesteps[view, level]
                latents: Any = batch.latents[view]
                noisy = scheduler.add_noise(latents, noise, steps)
                target = scheduler.get_velocity(latents, noise, steps) if is_v else noise
                found = model.unet(noisy, steps, encoder_hidden_states=tokens).sample
                error = (found - target).square().mean(dim=(1, 2, 3))
                snr = compute_snr(scheduler, steps)
                weights = snr.clamp(max=2.0) / (snr + 1 if is_v else snr)
                errors.setdefault(0.0, []).append(error)
                errors.setdefault(2.0, []).append(error * weights)
    losses: dict[str, Tensor] = {}
    for gamma, expected in errors.items():
        params = loss_params(recon_passes=6, min_snr_gamma=gamma)
        losses = TrainingStep(model, loss=params, decode_batch_size=4)(batch)
        found = losses["reconstruction"].detach()
        torch.testing.assert_close(found, torch.stack(expected).mean())
    assert losses["contrastive"].isfinite()
    losses["loss"].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained >= {n for n, p in model.named_parameters() if "lora_" in n and p.requires_grad}
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)


SOLVERS: dict[str, Callable[..., Any]] = {
    "ddim": DDIMScheduler.from_config,
    "dpmsolver++": DPMSolverMultistepScheduler.from_config,
    "unipc": UniPCMultistepScheduler.from_config,
}


@pytest.mark.parametrize(
    ("base", "solver"),
    [
        *((name, "ddim") for name in BASES),
        *((name, solver) for name in ("sd2", "zero SNR") for solver in ("dpmsolver++", "unipc")),
    ],
    indirect=["base"],
)
@torch.no_grad()
def test_samples_are_those_of_diffusers_pipeline_with_the_exported_lora(
    base: Base, tmp_path: Path, solver: Any
):
    folder, model, num_steps = base
    num_steps = num_steps if solver == "ddim" else 6
    write_lora(tmp_path, model.unet, Architecture.model_validate(ARCHITECTURE).lora)
    stock = DDIMScheduler.from_pretrained(folder / "scheduler").config
    more = {} if solver == "ddim" else {"timestep_spacing": "linspace"}
    others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=SOLVERS[solver](stock, **more),
        **others,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    latents, width = draw(2, 4, 8, 8, seed=0), model.unet.config["cross_attention_dim"]
    tokens, null = draw(2, 16, width, seed=1), draw(2, 16, width, seed=2)
    steps = torch.tensor([3, 17])
    found = pipeline.unet(latents, steps, tokens).sample
    torch.testing.assert_close(model.predict(latents, steps, tokens), found, rtol=1e-4, atol=1e-4)
    scheduler = load_solver(folder, solver=solver, num_inference_steps=num_steps)
    ours = denoise(model, scheduler, latents, tokens, null_tokens=null, guidance=1.5)
    expected = pipeline(
        prompt_embeds=tokens,
        negative_prompt_embeds=null,
        latents=latents,
        guidance_scale=1.5,
        num_inference_steps=num_steps,
        height=32,
        width=32,
        output_type="latent",
    ).images
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_features_read_the_unets_own_maps(base: Base):
    folder, model, _ = base
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    latents: Any = draw(2, 4, 8, 8, seed=0)
    tokens = draw(2, 16, model.unet.config["cross_attention_dim"], seed=1)
    noise = draw(3, 2, 4, 8, 8, seed=2)
    grid = model.schedule.ddim_timesteps(CHAIN_STEPS)
    triple = [grid[9], grid[2], grid[5]]
    options: dict[str, Any] = {"timesteps": triple, "blocks": [model.block]}
    direct = model.level_maps(latents, tokens, noise=noise, **options)[model.block]
    chain = inverted_maps(model, latents, tokens, **options)[model.block]

    seen = watch_maps(model, model.block)
    for level, timestep in enumerate(sorted(triple, reverse=True)):
        steps = torch.tensor([timestep] * 2)
        model.unet(scheduler.add_noise(latents, noise[level], steps), steps, tokens)
    torch.testing.assert_close(direct, torch.stack(seen, dim=1), rtol=1e-4, atol=1e-4)
    seen.clear()
    alphas = scheduler.alphas_cumprod
    scheduler.set_timesteps(CHAIN_STEPS)
    for here, above in pairwise(grid[:11]):
        prediction = model.unet(latents, here, tokens).sample
        clean = scheduler.step(prediction, here, latents).pred_original_sample
        rest = (latents - alphas[here].sqrt() * clean) / (1 - alphas[here]).sqrt()
        latents = alphas[above].sqrt() * clean + (1 - alphas[above]).sqrt() * rest
    expected = torch.stack([seen[grid.index(step)] for step in sorted(triple, reverse=True)], 1)
    torch.testing.assert_close(chain, expected, rtol=1e-3, atol=1e-3)
    first, second = model.attention(direct)
    assert not first.equal(second)
