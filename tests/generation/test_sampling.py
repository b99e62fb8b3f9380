"""Samples must equal those of plainly written DDIM and guidance, for any batch size."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.base.loading import load_scheduler, load_vae
from contradiff.base.vae import decode_latents
from contradiff.generation.conditions import Conditioning, seeded_noise, unconditional
from contradiff.generation.params import GenerateParams
from contradiff.generation.sampling import denoise, generate
from contradiff.generation.solvers import load_solver
from contradiff.method.lora import cast_frozen_weights, merge_lora
from contradiff.method.model import ContraDiffModel
from tests.settings import GENERATE, norms_in_bfloat16


@pytest.fixture
def model(build_tiny: Callable[..., ContraDiffModel]) -> ContraDiffModel:
    return build_tiny()


def slow_ddim(
    model: ContraDiffModel,
    latents: Tensor,
    num_steps: int,
    predict: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Run DDIM (Eq. 12, sigma = 0) on "leading" timesteps with offset 1, down to timestep 0."""
    alphas, stride = model.schedule.alphas_cumprod, 1000 // num_steps
    for k in reversed(range(num_steps)):
        timestep = k * stride + 1
        alpha = alphas[timestep]
        previous = alphas[timestep - stride] if timestep >= stride else alphas[0]
        noise_pred = predict(latents, timestep)
        clean = (latents - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
        latents = previous.sqrt() * clean + (1 - previous).sqrt() * noise_pred
    return latents


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample_with(
    model: ContraDiffModel,
    base: Path,
    conditioning: Conditioning,
    *,
    indices: range = range(5),
    seed: int = 0,
    **changes: Any,
) -> list[Tensor]:
    """Generate samples in three steps. `changes` are parameters of section `generate`."""
    params = GenerateParams.model_validate(GENERATE | {"batch_size": 5} | changes)
    solver = load_solver(base, solver=params.solver, num_inference_steps=3)
    settings = {"params": params, "image_size": 32, "seed": seed}
    return list(generate(model, load_vae(base), solver, indices, conditioning, **settings))


def generate_unconditional(
    model: ContraDiffModel, base: Path, *, seed: int = 0, **changes: Any
) -> list[Tensor]:
    return sample_with(model, base, unconditional(model, seed=seed), seed=seed, **changes)


def assert_same_images(actual: Tensor, expected: Tensor) -> None:
    """Values may differ by 1 of 255, because batches of another size sum in another order."""
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=1)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "unipc"])
def test_samples_do_not_depend_on_the_batch_size(
    model: ContraDiffModel, tiny_base: Path, solver: str
):
    sample = partial(generate_unconditional, model, tiny_base, indices=range(7), solver=solver)
    [whole] = sample(batch_size=7)
    assert (whole.shape, whole.dtype) == ((7, 3, 32, 32), torch.uint8)
    assert len(whole.flatten(1).unique(dim=0)) == 7
    for batch_size, sizes in ((3, [3, 3, 1]), (1, [1] * 7)):
        batches = sample(batch_size=batch_size)
        assert [len(batch) for batch in batches] == sizes
        assert_same_images(torch.cat(batches), whole)


@torch.no_grad()
def test_a_sample_is_made_of_its_own_noises(model: ContraDiffModel, tiny_base: Path):
    """Sample 3 is computed step by step: c(Gaussian pixels), DDIM, the VAE."""
    whole = generate_unconditional(model, tiny_base, seed=7)
    assert torch.equal(whole[0], generate_unconditional(model, tiny_base, seed=7)[0])
    latents = seeded_noise((4, 8, 8), seed=7, indices=range(3, 4), stream="latent")
    pixels = seeded_noise((3, 32, 32), seed=7, indices=range(3, 4), stream="condition")
    tokens = model.encode_condition(pixels)

    def predict(noisy: Tensor, timestep: int) -> Tensor:
        return model.unet(noisy, timestep, encoder_hidden_states=tokens).sample

    expected = decode_latents(load_vae(tiny_base), slow_ddim(model, latents, 3, predict))
    torch.testing.assert_close(whole[0][3].float(), expected[0].float(), rtol=0, atol=1)


@torch.no_grad()
def test_guidance_outside_its_interval_is_none(model: ContraDiffModel, tiny_base: Path):
    latents, tokens, null = (
        draw(*shape, seed=seed)
        for seed, shape in enumerate([(2, 4, 8, 8), (2, 16, 16), (2, 16, 16)])
    )

    def predict(noisy: Tensor, timestep: int) -> Tensor:
        conditional = model.unet(noisy, timestep, encoder_hidden_states=tokens).sample
        if not 285 <= timestep <= 571:  # the timesteps are 1, 143, 285, 427, 569, 711, 853
            return conditional
        unguided = model.unet(noisy, timestep, encoder_hidden_states=null).sample
        return unguided + 3 * (conditional - unguided)

    scheduler = load_scheduler(tiny_base, num_inference_steps=7)
    guided = partial(denoise, model, scheduler, latents, tokens, null_tokens=null, guidance=3.0)
    ours = guided(guidance_interval=(0.285, 0.571))
    torch.testing.assert_close(ours, slow_ddim(model, latents, 7, predict), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, guided(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "unipc"])
@torch.no_grad()
def test_denoise_equals_diffusers_loop(
    model: ContraDiffModel, tiny_base: Path, solver: Any, guidance: float
):
    """The loop is StableDiffusionPipeline's, with the UNet's own forward pass."""
    latents, tokens = draw(2, 4, 8, 8, seed=0), draw(2, 16, 16, seed=1)
    guided = guidance != 1
    null = draw(2, 16, 16, seed=2) if guided else None
    scheduler: Any = load_solver(tiny_base, solver=solver, num_inference_steps=7)
    ours = [
        denoise(model, scheduler, latents, tokens, null_tokens=null, guidance=guidance)
        for _ in range(2)
    ]
    # a solver's state after one batch does not change the next batch
    assert torch.equal(*ours)
    expected = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = torch.cat([expected] * 2) if guided else expected
        inputs = scheduler.scale_model_input(inputs, timestep)
        states = tokens if null is None else torch.cat([null, tokens])
        noise_pred = model.unet(inputs, timestep, encoder_hidden_states=states).sample
        if guided:
            unconditional_pred, text_pred = noise_pred.chunk(2)
            noise_pred = unconditional_pred + guidance * (text_pred - unconditional_pred)
        expected = scheduler.step(noise_pred, timestep, expected).prev_sample
    torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-4)


def test_bf16_is_autocast_of_the_unet_alone(model: ContraDiffModel, tiny_base: Path):
    """Images are near fp32's. Casting the frozen weights once or at every pass gives the same."""
    merge_lora(model.unet)
    [exact] = generate_unconditional(model, tiny_base)
    uncast = deepcopy(model)
    norms_in_bfloat16(uncast.unet)
    [autocast] = generate_unconditional(uncast, tiny_base, precision="bf16")
    assert 0 < (autocast.float() - exact.float()).abs().mean() < 3
    before = {name: p.clone() for name, p in model.named_parameters() if "unet" not in name}
    cast_frozen_weights(model.unet)
    norms = [m for m in model.unet.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {m.weight.dtype for m in [*norms, model.unet.conv_in]} == {torch.bfloat16}
    [cast] = generate_unconditional(model, tiny_base, precision="bf16")
    assert torch.equal(cast, autocast)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize(
    ("broken", "changes", "message"),
    [
        ("unet", {}, "sample 3 became NaN .* timestep 334: the UNet .*base.path.*pretrain.lr"),
        ("unet", {"precision": "bf16"}, "sample 3 .* timestep 334: generate.precision: bf16"),
        ("unet", {"guidance": 9.0, "condition": "class"}, "sample 3 .*: generate.guidance: 9"),
        (
            "scheduler",
            {},
            "sample 0 .* timestep 999: .* solver's step is not. base.path: .*_config",
        ),
        ("vae", {}, "base.path: the VAE decodes image 0 to NaN"),
    ],
)
def test_the_first_sample_that_is_not_finite_ends_generation(  # noqa: PLR0917
    model: ContraDiffModel,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    changes: dict[str, Any],
    message: str,
):
    """Without the check, NaN becomes black PNGs, which get a FID."""
    params = GenerateParams.model_validate(GENERATE | {"batch_size": 2} | changes)
    vae, solver = load_vae(tiny_base), load_scheduler(tiny_base, num_inference_steps=3)
    predict = model.predict

    def breaking(latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        found = predict(latents, timesteps, tokens)
        if int(timesteps[0]) == 334 and tokens[0, 0, 0] == 2:
            found[1, 0, 0, 0] = torch.inf
        return found

    if broken == "unet":
        monkeypatch.setattr(model, "predict", breaking)
    elif broken == "vae":
        torch.nn.init.constant_(vae.decoder.conv_out.bias, torch.nan)
    else:  # alpha-bar is 0 at the last timestep, and DDIM divides by its root
        zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        solver = type(solver).from_config(solver.config, **zero_snr)
        solver.set_timesteps(3)

    def tokens(indices: range) -> Tensor:
        return torch.full((len(indices), 16, 16), float(indices.start))

    settings: dict[str, Any] = {"params": params, "image_size": 32, "seed": 0}
    with pytest.raises(ValueError, match=message):
        list(generate(model, vae, solver, range(5), Conditioning(tokens, tokens), **settings))


def test_null_condition_is_encoded_only_for_guidance(model: ContraDiffModel, tiny_base: Path):
    asked: list[range] = []

    def null_tokens(indices: range) -> Tensor:
        asked.append(indices)
        return torch.zeros(len(indices), 16, 16)

    conditioning = Conditioning(unconditional(model, seed=0).tokens, null_tokens=null_tokens)
    sample_with(model, tiny_base, conditioning, batch_size=2)
    assert asked == []
    sample_with(model, tiny_base, conditioning, batch_size=2, condition="class", guidance=2.0)
    assert asked == [range(2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"solver": "euler"}, "solver"),
        ({"precision": "fp16"}, "precision"),
        ({"guidance_interval": [0.5, 0.2]}, r"guidance_interval: set two numbers .*0\.5, 0\.2"),
        ({"guidance_interval": [0.0, 1.5]}, "guidance_interval: set two numbers from 0 to 1"),
        ({"guidance_interval": [0.0]}, "guidance_interval"),
        ({"guidance": 1.0, "guidance_interval": [0.0, 0.5]}, r"generate\.guidance is 1"),
        ({"condition": "noise"}, r'guidance: 2 .* generate\.condition "noise"; set'),
    ],
)
def test_bad_parameters_are_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        GenerateParams.model_validate(GENERATE | {"condition": "class", "guidance": 2.0} | changes)
