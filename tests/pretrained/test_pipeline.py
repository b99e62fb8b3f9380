"""The pipeline of diffusers makes the images of `ContraDiff.generate`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler

from contradiff.base.vae import decode_latents
from contradiff.generation.conditions import seeded_noise
from contradiff.pretrained.folder import Parts
from contradiff.pretrained.model import ContraDiff
from contradiff.pretrained.pipeline import ContraDiffPipeline
from tests.pretrained.conftest import copy_project


@pytest.fixture(scope="module")
def model(parts: Parts) -> ContraDiff:
    return ContraDiff(parts, device="cpu")


@pytest.fixture
def pipe(model: ContraDiff) -> ContraDiffPipeline:
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu")


def test_images_are_those_of_generate(model: ContraDiff, pipe: ContraDiffPipeline):
    latents = seeded_noise((4, 8, 8), seed=0, indices=range(3), stream="latent")
    image = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    for given, condition in (
        ({"class_labels": [0, 1, 2]}, ["a", "b", "c"]),
        ({"image": image}, image),
    ):
        number = 3 if "image" in given else 1
        expected = model.generate(3, condition=condition, guidance=1.0)
        found = pipe(**given, batch_size=number, latents=latents, num_inference_steps=2).images
        difference = np.stack(found).astype(int) - np.stack(expected)
        assert abs(difference).max() <= 1


def test_a_base_that_predicts_v_is_sampled_in_v_by_both(project: Path, tmp_path: Path):
    """The same weights, read as a prediction of v, make other images; a stock loop agrees."""
    root = copy_project(project, tmp_path / "project")
    base = root / "build/base"
    copied = Path(shutil.copytree(base.resolve(), tmp_path / "base"))
    base.unlink()
    base.symlink_to(copied)
    path = copied / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    [as_v], [as_noise] = (
        ContraDiff.from_project(place, device="cpu").generate(1, seed=0)
        for place in (root, project)
    )
    model = ContraDiff.from_project(root, device="cpu")
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    noise, pixels = (
        seeded_noise(shape, seed=0, indices=range(1), stream=stream)
        for shape, stream in (((4, 8, 8), "latent"), ((3, 32, 32), "condition"))
    )
    scheduler = DDIMScheduler.from_pretrained(copied / "scheduler")
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    scheduler.set_timesteps(2)
    network, latents = pipe.trained.network, noise
    with torch.no_grad():
        tokens = network.encode_condition(pixels)
        for step in scheduler.timesteps:
            velocity = network.unet(latents, step, tokens).sample
            latents = scheduler.step(velocity, step, latents).prev_sample
        decoded = decode_latents(pipe.vae, latents)[0].permute(1, 2, 0).numpy()
    assert abs(np.asarray(as_v).astype(int) - decoded).max() <= 1
    assert abs(np.asarray(as_v).astype(int) - np.asarray(as_noise)).max() > 1
    network.encode_condition = lambda _: tokens  # pyright: ignore[reportAttributeAccessIssue]
    found = pipe(latents=noise, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


def test_arguments_are_those_of_diffusers(pipe: ContraDiffPipeline):
    seen: list[tuple[int, int]] = []

    def callback(
        pipeline: object, number: int, timestep: torch.Tensor, given: dict[str, Any]
    ) -> Any:
        assert pipeline is pipe
        seen.append((number, int(timestep)))
        return {"latents": torch.zeros_like(given["latents"])} if number == 2 else {}

    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "batch_size": 2}
    again = {"generator": torch.Generator().manual_seed(1)}
    (zeros,) = pipe(**options, **again, return_dict=False, callback_on_step_end=callback)
    assert not zeros.any()
    assert [number for number, _ in seen] == [0, 1, 2]
    draws = [pipe(generator=torch.Generator().manual_seed(1), **options).images for _ in range(2)]
    assert draws[0].shape == (2, 4, 8, 8)
    assert draws[0].equal(draws[1])
    assert not draws[0][0].equal(draws[0][1])
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    other = pipe(generator=torch.Generator().manual_seed(1), **options).images
    assert not other.equal(draws[0])
    assert pipe(output_type="pt", num_inference_steps=1).images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale: without image or class_labels"),
        ({"image": "a.png", "class_labels": 0}, "either image or class_labels"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "latents: the shape is"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "only latents"),
    ],
)
def test_contradictions_are_refused(
    pipe: ContraDiffPipeline, arguments: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=1, **arguments)
    with pytest.raises(ValueError, match=r"use contradiff\.export"):
        pipe.save_pretrained("x")
