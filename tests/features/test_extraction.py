"""Features are those of the image, whatever else is in its batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from contradiff.base.loading import load_vae
from contradiff.data.latents import StoredLatents
from contradiff.data.shards import image_of, read_images, read_split
from contradiff.data.transforms import apply_crop, centre_crop, decode
from contradiff.features.extraction import (
    CleanBatch,
    FeatureSet,
    encoded_batches,
    extract,
    maps_of,
    stored_batches,
)
from contradiff.method.model import ContraDiff
from contradiff.types import to_pixels
from tests.settings import features_params

CPU = torch.device("cpu")
Build = Callable[..., ContraDiff]


@pytest.fixture
def model(build_tiny: Build) -> ContraDiff:
    return build_tiny()


def batches_of(tiny_data: Path, *, split: str = "train", batch_size: int = 8) -> list[CleanBatch]:
    folders = tiny_data / "images", tiny_data / "latents"
    return list(stored_batches(*folders, split=split, batch_size=batch_size))


def features_of(
    model: ContraDiff, batches: list[CleanBatch], *, pool: Any = "attention", **changes: Any
) -> FeatureSet:
    told: list[int] = []
    features = extract(
        model,
        batches,
        params=features_params(**changes),
        pool=pool,
        seed=0,
        device=CPU,
        on_progress=told.append,
    )
    assert told == [len(batch.keys) for batch in batches]
    return features


def test_stored_batches_are_the_split_in_order(tiny_data: Path):
    batches = batches_of(tiny_data, batch_size=10)
    assert [len(batch.keys) for batch in batches] == [10, 10, 4]
    assert [i for batch in batches for i in batch.indices] == list(range(24))
    images = list(read_images(tiny_data / "images", "train"))
    assert [key for batch in batches for key in batch.keys] == [image.key for image in images]
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == [image.label for image in images]


def test_stored_batches_show_the_centre_crop(tiny_data: Path):
    (batch,) = batches_of(tiny_data, split="val")
    records = zip(
        read_split(tiny_data / "images", "val"),
        read_split(tiny_data / "latents", "val"),
        strict=True,
    )
    for index, (image, latent) in enumerate(records):
        sample, stored = image_of(image), StoredLatents.of_record(latent)
        shown = apply_crop(decode(sample.image, name=""), centre_crop(40, 36), size=32)
        assert batch.pixels[index].equal(to_pixels(shown[None])[0])
        mean = torch.from_numpy(stored.moments[0, :4]).float()
        assert batch.latents[index].equal(0.5 * mean)  # tiny_base's scaling factor


@pytest.mark.parametrize(
    ("noising", "condition"), [("direct", "image"), ("direct", "noise"), ("ddim_chain", "image")]
)
@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_batch_size_changes_nothing(
    model: ContraDiff, tiny_data: Path, noising: str, condition: str, batch_size: int
):
    settings = {"noising": noising, "condition": condition}
    expected = features_of(model, batches_of(tiny_data), **settings)
    batches = batches_of(tiny_data, batch_size=batch_size)
    shown = features_of(model, batches, **settings)
    assert (shown.keys, shown.labels.tolist()) == (expected.keys, expected.labels.tolist())
    assert expected.features.std(dim=0).min() > 1e-2
    torch.testing.assert_close(shown.features, expected.features, atol=1e-4, rtol=1e-4)


def test_order_of_the_triple_changes_nothing(model: ContraDiff, tiny_data: Path):
    """The noisiest level is the query, wherever it stands in the parameters."""
    batches = batches_of(tiny_data, split="val")
    first = features_of(model, batches, timesteps=[401, 201, 101]).features
    assert features_of(model, batches, timesteps=[101, 401, 201]).features.equal(first)
    other = features_of(model, batches, timesteps=[402, 201, 101]).features
    assert (other - first).abs().max() > 1e-6


def test_condition_is_used(model: ContraDiff, tiny_data: Path):
    batches = batches_of(tiny_data, split="val")
    with_image = features_of(model, batches, condition="image").features
    with_noise = features_of(model, batches, condition="noise").features
    assert (with_image - with_noise).abs().max() > 1e-4


@pytest.mark.parametrize("noising", ["direct", "ddim_chain"])
def test_only_direct_noising_is_random(model: ContraDiff, tiny_data: Path, noising: str):
    """There, every image has noise of its own, and every seed another."""
    (batch,) = batches_of(tiny_data, split="val")
    twins = CleanBatch(
        (0, 1),
        batch.latents[:1].repeat(2, 1, 1, 1),
        batch.pixels[:1].repeat(2, 1, 1, 1),
        batch.labels[:2],
        batch.keys[:2],
    )
    params = features_params(noising=noising)
    first, second = maps_of(model, twins, params=params, seed=0, device=CPU)
    other, _ = maps_of(model, twins, params=params, seed=1, device=CPU)
    for changed in (second, other):
        difference = (first - changed).abs().max()
        assert difference > 1e-2 if noising == "direct" else difference < 1e-5


def test_a_chain_needs_a_triple_on_its_grid(model: ContraDiff, tiny_data: Path):
    (batch,) = batches_of(tiny_data, split="val")
    params = features_params(noising="ddim_chain", timesteps=[401, 200, 101])
    with pytest.raises(ValueError, match=r"^features\.timesteps: with features\.noising ddim"):
        maps_of(model, batch, params=params, seed=0, device=CPU)


def test_pooling(model: ContraDiff, tiny_data: Path):
    batches = batches_of(tiny_data, split="val", batch_size=5)
    maps = torch.cat(
        [maps_of(model, batch, params=features_params(), seed=0, device=CPU) for batch in batches]
    )
    assert maps.shape == (8, 3, 32, 2, 2)
    mean = features_of(model, batches, pool="mean").features
    torch.testing.assert_close(mean, maps.mean(dim=(3, 4)).reshape(8, 3 * 32))
    with torch.no_grad():
        expected = model.attention(maps)
    attended = features_of(model, batches, pool="attention").features
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


def test_timestep_beyond_the_base_is_named(model: ContraDiff, tiny_data: Path):
    (batch,) = batches_of(tiny_data, split="val")
    with pytest.raises(ValueError, match=r"^features\.timesteps: .* last timestep, 999$"):
        maps_of(model, batch, params=features_params(timesteps=[1000, 2, 1]), seed=0, device=CPU)
    maps_of(model, batch, params=features_params(timesteps=[999, 1, 0]), seed=0, device=CPU)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_images_in_memory_are_encoded_as_stored_ones(
    tiny_base: Path, tiny_data: Path, batch_size: int
):
    (stored,) = batches_of(tiny_data, split="val")
    images = torch.stack(
        [
            decode(image.image, name="")[:, 2:38]  # the centre crop
            for image in read_images(tiny_data / "images", "val")
        ]
    )
    batches = list(
        encoded_batches(
            load_vae(tiny_base),
            images,
            stored.labels,
            image_size=32,
            batch_size=batch_size,
            device=CPU,
        )
    )
    assert [i for batch in batches for i in batch.indices] == list(range(8))
    assert [key for batch in batches for key in batch.keys] == [str(index) for index in range(8)]
    assert torch.cat([batch.labels for batch in batches]).equal(stored.labels)
    assert torch.cat([batch.pixels for batch in batches]).equal(stored.pixels)
    latents = torch.cat([batch.latents for batch in batches])
    torch.testing.assert_close(latents, stored.latents, atol=2e-3, rtol=2e-3)
