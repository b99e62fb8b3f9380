"""contradiff.sampling against DDIM and guidance written out; conditions of any batch size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from contradiff.backbone import load_scheduler, load_vae
from contradiff.checkpoint import Architecture
from contradiff.class_condition import ClassTable
from contradiff.extraction import stored_batches
from contradiff.latents import decode_latents
from contradiff.model import ContraDiff, build_model
from contradiff.sampling import (
    Conditioning,
    GenerateParams,
    balanced_label,
    class_conditional,
    denoise,
    endless_images,
    generate,
    image_conditional,
    seeded_noise,
    unconditional,
)

CPU = torch.device("cpu")


@pytest.fixture
def model(build_tiny: Callable[..., ContraDiff]) -> ContraDiff:
    return build_tiny()


def slow_ddim(
    model: ContraDiff, latents: Tensor, num_steps: int, predict: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """DDIM's Eq. 12 with sigma = 0 on "leading" timesteps, offset 1, ending at alpha-bar of 0."""
    alphas = model.schedule.alphas_cumprod
    stride = 1000 // num_steps
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


@torch.no_grad()
def test_denoise_equals_ddim_written_out(model: ContraDiff, tiny_base: Path):
    latents, tokens = draw(2, 4, 8, 8, seed=0), draw(2, 16, 16, seed=1)
    scheduler = load_scheduler(tiny_base, num_inference_steps=7)
    ours = denoise(model, scheduler, latents, tokens)

    def predict(noisy: Tensor, timestep: int) -> Tensor:
        return model.unet(noisy, timestep, encoder_hidden_states=tokens).sample

    expected = slow_ddim(model, latents, 7, predict)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def sample_with(
    model: ContraDiff,
    base: Path,
    conditioning: Conditioning,
    *,
    batch_size: int = 5,
    **changes: Any,
) -> tuple[list[Tensor], list[int]]:
    """Five samples in three steps; keywords are the seed and fields of `generate`."""
    progress: list[int] = []
    seed = changes.pop("seed", 0)
    settings = {"condition": "noise", "guidance": 1.0, "num_samples": 5, "num_inference_steps": 3}
    batches = generate(
        model,
        load_vae(base),
        load_scheduler(base, num_inference_steps=3),
        conditioning=conditioning,
        params=GenerateParams.model_validate(settings | {"batch_size": batch_size} | changes),
        image_size=32,
        seed=seed,
        device=CPU,
        on_progress=progress.append,
    )
    return list(batches), progress


def generate_unconditional(
    model: ContraDiff, base: Path, *, batch_size: int, seed: int = 0
) -> tuple[list[Tensor], list[int]]:
    conditioning = unconditional(model, seed=seed, device=CPU)
    return sample_with(model, base, conditioning, batch_size=batch_size, seed=seed)


def test_samples_do_not_depend_on_the_batch_size(model: ContraDiff, tiny_base: Path):
    whole, progress = generate_unconditional(model, tiny_base, batch_size=8)
    assert [len(batch) for batch in whole] == progress == [5]
    parts, progress = generate_unconditional(model, tiny_base, batch_size=2)
    assert [len(batch) for batch in parts] == progress == [2, 2, 1]
    samples = torch.cat(parts)
    assert samples.shape == (5, 3, 32, 32)
    assert samples.dtype == torch.uint8
    # A level of 255 at most: sums are taken in another order.
    torch.testing.assert_close(samples.float(), whole[0].float(), rtol=0, atol=1)
    assert len(samples.flatten(1).unique(dim=0)) == 5


def test_samples_depend_on_the_seed(model: ContraDiff, tiny_base: Path):
    first, _ = generate_unconditional(model, tiny_base, batch_size=5, seed=0)
    again, _ = generate_unconditional(model, tiny_base, batch_size=5, seed=0)
    other, _ = generate_unconditional(model, tiny_base, batch_size=5, seed=1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@torch.no_grad()
def test_a_sample_is_made_of_its_own_noises(model: ContraDiff, tiny_base: Path):
    """Sample 3 by hand: c(Gaussian pixels), DDIM, the VAE."""
    whole, _ = generate_unconditional(model, tiny_base, batch_size=5, seed=7)
    latents = seeded_noise((4, 8, 8), seed=7, index=3, stream="latent")[None]
    pixels = seeded_noise((3, 32, 32), seed=7, index=3, stream="condition")[None]
    tokens = model.encode_condition(pixels)

    def predict(noisy: Tensor, timestep: int) -> Tensor:
        return model.unet(noisy, timestep, encoder_hidden_states=tokens).sample

    expected = decode_latents(load_vae(tiny_base), slow_ddim(model, latents, 3, predict))
    torch.testing.assert_close(whole[0][3].float(), expected[0].float(), rtol=0, atol=1)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@torch.no_grad()
def test_guidance_equals_two_passes_written_out(
    model: ContraDiff, tiny_base: Path, guidance: float
):
    latents, null = draw(2, 4, 8, 8, seed=0), draw(2, 16, 16, seed=2)
    tokens = draw(2, 16, 16, seed=1)

    def predict(noisy: Tensor, timestep: int) -> Tensor:
        conditional = model.unet(noisy, timestep, encoder_hidden_states=tokens).sample
        unguided = model.unet(noisy, timestep, encoder_hidden_states=null).sample
        return (1 - guidance) * unguided + guidance * conditional

    ours = denoise(
        model,
        load_scheduler(tiny_base, num_inference_steps=7),
        latents,
        tokens,
        null_tokens=null,
        guidance=guidance,
    )
    expected = slow_ddim(model, latents, 7, predict)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    alone = slow_ddim(
        model, latents, 7, lambda x, t: model.unet(x, t, encoder_hidden_states=tokens).sample
    )
    assert not torch.allclose(ours, alone, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_guidance_of_1_is_the_condition_alone(model: ContraDiff, tiny_base: Path):
    """Computed without the null condition, or with it: the same."""
    latents, tokens, null = (
        draw(*shape, seed=seed)
        for seed, shape in enumerate([(2, 4, 8, 8), (2, 16, 16), (2, 16, 16)])
    )
    scheduler = load_scheduler(tiny_base, num_inference_steps=7)
    alone = denoise(model, scheduler, latents, tokens)
    guided = denoise(model, scheduler, latents, tokens, null_tokens=null, guidance=1.0)
    torch.testing.assert_close(guided, alone, rtol=1e-4, atol=1e-4)


def test_null_condition_is_encoded_only_for_guidance(model: ContraDiff, tiny_base: Path):
    asked: list[range] = []

    def null_tokens(indices: range) -> Tensor:
        asked.append(indices)
        return torch.zeros(len(indices), 16, 16)

    conditioning = Conditioning(
        unconditional(model, seed=0, device=CPU).tokens, null_tokens=null_tokens
    )
    sample_with(model, tiny_base, conditioning, batch_size=2)
    assert asked == []
    sample_with(model, tiny_base, conditioning, batch_size=2, condition="image", guidance=2.0)
    assert asked == [range(2), range(2, 4), range(4, 5)]


@pytest.fixture
def table() -> ClassTable:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table = ClassTable(num_classes=3, width=8, cross_attention_dim=16)
        torch.nn.init.normal_(table.to_tokens.weight)
    return table.eval()


def conditioned_on(kind: str, model: ContraDiff, data: Path, table: ClassTable) -> Conditioning:
    if kind == "class":
        return class_conditional(table, device=CPU)
    null = unconditional(model, seed=0, device=CPU)
    images = endless_images(data / "images", data / "latents", batch_size=3)
    return image_conditional(model, images, null_tokens=null.null_tokens, device=CPU)


@pytest.mark.parametrize("kind", ["image", "class"])
def test_conditional_samples_do_not_depend_on_the_batch_size(
    model: ContraDiff, tiny_base: Path, tiny_data: Path, table: ClassTable, kind: str
):
    samples: list[Tensor] = []
    for batch_size in (10, 3):
        conditioning = conditioned_on(kind, model, tiny_data, table)
        parts, _ = sample_with(
            model,
            tiny_base,
            conditioning,
            batch_size=batch_size,
            num_samples=10,
            condition=kind,
            guidance=1.5,
        )
        samples.append(torch.cat(parts))
    torch.testing.assert_close(samples[0].float(), samples[1].float(), rtol=0, atol=1)


@torch.no_grad()
def test_sample_i_is_conditioned_on_image_i(model: ContraDiff, tiny_data: Path, table: ClassTable):
    """There are eight: sample 8 has the first again."""
    [images] = stored_batches(
        tiny_data / "images", tiny_data / "latents", split="val", batch_size=8
    )
    expected = model.encode_condition(images.pixels)[[*range(8), 0, 1]]
    conditioning = conditioned_on("image", model, tiny_data, table)
    tokens = [conditioning.tokens(range(4)), conditioning.tokens(range(4, 10))]
    torch.testing.assert_close(torch.cat(tokens), expected)
    noise = seeded_noise((3, 32, 32), seed=0, index=9, stream="condition")[None]
    null = conditioning.null_tokens(range(8, 10))
    torch.testing.assert_close(null[1:], model.encode_condition(noise))


@torch.no_grad()
def test_conditioner_of_latents_gets_latents(
    tiny_base: Path, tiny_params: dict[str, Any], tiny_data: Path, table: ClassTable
):
    shapes = Architecture.model_validate(
        tiny_params
        | {"conditioner": tiny_params["conditioner"] | {"input": "latents", "patch_size": 2}}
    )
    with torch.random.fork_rng(devices=[]):
        model = build_model(
            tiny_base,
            lora=shapes.lora,
            conditioner=shapes.conditioner,
            head=shapes.head,
            image_size=32,
            seed=0,
        ).eval()
    torch.nn.init.normal_(
        model.conditioner.to_tokens.weight, generator=torch.Generator().manual_seed(0)
    )
    [images] = stored_batches(
        tiny_data / "images", tiny_data / "latents", split="val", batch_size=8
    )
    conditioning = conditioned_on("image", model, tiny_data, table)
    expected = model.encode_condition(images.latents[:5])
    torch.testing.assert_close(conditioning.tokens(range(5)), expected)
    noise = seeded_noise((4, 8, 8), seed=0, index=1, stream="condition")[None]
    null = conditioning.null_tokens(range(2))
    torch.testing.assert_close(null[1:], model.encode_condition(noise))


@torch.no_grad()
def test_classes_come_in_turn(table: ClassTable):
    conditioning = class_conditional(table, device=CPU)
    tokens = conditioning.tokens(range(4, 9))
    assert torch.equal(tokens, table(torch.tensor([1, 2, 0, 1, 2])))
    assert torch.equal(conditioning.null_tokens(range(2)), table(torch.tensor([3, 3])))


@pytest.mark.parametrize(("num_samples", "counts"), [(3000, {3}), (3001, {3, 4}), (999, {0, 1})])
def test_labels_are_balanced(num_samples: int, counts: set[int]):
    labels = [balanced_label(index, num_classes=1000) for index in range(num_samples)]
    assert set(torch.bincount(torch.tensor(labels), minlength=1000).tolist()) == counts


def test_guidance_of_noise_is_refused():
    settings = {"num_samples": 5, "num_inference_steps": 3, "batch_size": 2, "condition": "noise"}
    expected = r"generate\.guidance is 1\.5, but generate\.condition: noise"
    with pytest.raises(ValidationError, match=expected):
        GenerateParams.model_validate(settings | {"guidance": 1.5})
    assert GenerateParams.model_validate(settings | {"guidance": 1.0}).guidance == 1


def test_seeded_noise_repeats_and_its_streams_differ():
    key: dict[str, Any] = {"seed": 5, "index": 2, "stream": "latent"}
    noise = seeded_noise((4, 32, 32), **key)
    assert torch.equal(noise, seeded_noise((4, 32, 32), **key))
    for change in ({"seed": 6}, {"index": 3}, {"stream": "condition"}):
        other = seeded_noise((4, 32, 32), **key | change)
        # Independent: correlations of 4096 pairs stay within five standard errors.
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / 64
    assert abs(noise.mean()) < 5 / 64
    assert abs(noise.std() - 1) < 5 / 64


@pytest.mark.parametrize("num_steps", [1, 20, 100, 500, 999])
def test_steps_within_the_schedule_are_taken(tiny_base: Path, num_steps: int):
    timesteps = load_scheduler(tiny_base, num_inference_steps=num_steps).timesteps
    expected = [k * (1000 // num_steps) + 1 for k in reversed(range(num_steps))]
    assert timesteps.tolist() == expected


@pytest.mark.parametrize("num_steps", [1000, 1001])
def test_too_many_steps_are_refused(tiny_base: Path, num_steps: int):
    """1000 too: the base's steps_offset would make its first timestep 1000, beyond the grid."""
    with pytest.raises(ValueError, match=rf"generate\.num_inference_steps: {num_steps} is more"):
        load_scheduler(tiny_base, num_inference_steps=num_steps)
