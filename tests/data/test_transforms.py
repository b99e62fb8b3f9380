"""Against Pillow, torchvision and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from contradiff.data.transforms import (
    ASPECT_RATIOS,
    Crop,
    apply_crop,
    centre_crop,
    jitter_colours,
    random_crop,
)
from contradiff.types import to_bytes, to_pixels

sides = st.integers(1, 600)


def picture(height: int, width: int) -> Image.Image:
    """Smooth, coloured, different everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 90 * np.sin(x / 5 + k) * np.cos(y / 7 - k) + 0.5 * k * y for k in range(3)]
    return Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@given(numbers=st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4), mirrored=st.booleans())
def test_crops_round_trip(numbers: list[int], mirrored: bool):
    crop = Crop(*numbers, mirrored)
    assert Crop.from_array(crop.to_array()) == crop


@given(height=sides, width=sides, scale_min=st.floats(0.05, 1.0), seed=st.integers(0, 2**32))
def test_crops_lie_within_the_image(height: int, width: int, scale_min: float, seed: int):
    crop = random_crop(np.random.default_rng(seed), height, width, scale_min=scale_min)
    assert 0 <= crop.top < crop.top + crop.height <= height
    assert 0 <= crop.left < crop.left + crop.width <= width
    centre = centre_crop(height, width)
    assert centre.height == centre.width == min(height, width)
    assert 0 <= height - centre.height - 2 * centre.top <= 1
    assert 0 <= width - centre.width - 2 * centre.left <= 1


def test_random_crops_are_distributed_as_torchvisions():
    rng = np.random.default_rng(0)
    ours = [random_crop(rng, 300, 400, scale_min=0.2) for _ in range(2000)]
    image = torch.empty(3, 300, 400)
    peer = RandomResizedCrop(8, scale=(0.2, 1.0), ratio=ASPECT_RATIOS)
    torch.manual_seed(0)
    drawn = [peer.make_params([image]) for _ in range(2000)]
    theirs = [Crop(p["top"], p["left"], p["height"], p["width"], mirrored=False) for p in drawn]

    def moments(crops: list[Crop]) -> np.ndarray:
        boxes = np.array([crop.to_array() for crop in crops], dtype=float)
        top, left, height, width, _ = boxes.T
        areas = height * width / (300 * 400)
        values = np.stack([areas, np.log(width / height), top / 300, left / 400], axis=1)
        return np.concatenate([values.mean(axis=0), values.std(axis=0)])

    # the standard error of each is below 0.006
    np.testing.assert_allclose(moments(ours), moments(theirs), atol=0.025)
    assert 0.45 < np.mean([crop.mirrored for crop in ours]) < 0.55


def test_image_too_narrow_for_the_ratios_is_cropped_in_the_middle():
    crop = random_crop(np.random.default_rng(0), 10, 500, scale_min=0.9)
    assert (crop.top, crop.left, crop.height, crop.width) == (0, 245, 10, 10)


@pytest.mark.parametrize("size", [8, 24, 64])
@pytest.mark.parametrize(
    "crop", [Crop(0, 0, 40, 40, mirrored=False), Crop(5, 9, 23, 31, mirrored=False)]
)
def test_crop_is_resized_as_pillow_does(crop: Crop, size: int):
    image = picture(40, 52)
    right, bottom = crop.left + crop.width, crop.top + crop.height
    cut = image.crop((crop.left, crop.top, right, bottom))
    expected = tensor_of(cut.resize((size, size), Image.Resampling.BICUBIC))
    assert (apply_crop(tensor_of(image), crop, size=size).int() - expected.int()).abs().max() <= 1


def test_crop_of_the_right_size_is_a_plain_cut_and_a_mirrored_one_is_mirrored():
    image = tensor_of(picture(40, 52))
    shown = apply_crop(image, Crop(3, 4, 16, 16, mirrored=False), size=16)
    assert shown.equal(image[:, 3:19, 4:20])
    plain = apply_crop(image, Crop(5, 9, 23, 31, mirrored=False), size=16)
    assert apply_crop(image, Crop(5, 9, 23, 31, mirrored=True), size=16).equal(plain.flip(2))


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_colours_are_distorted_as_the_generator_says(strength: float):
    image = tensor_of(picture(12, 12))
    first, again, other = (
        jitter_colours(image, np.random.default_rng(seed), strength=strength) for seed in (0, 0, 1)
    )
    assert (first.shape, first.dtype) == (image.shape, torch.uint8)
    assert first.equal(again)
    assert jitter_colours(image, np.random.default_rng(0), strength=0.0).equal(image)
    assert not first.equal(image)
    assert not first.equal(other)


def test_colours_of_one_in_five_are_taken_away():
    image, rng = tensor_of(picture(6, 6)), np.random.default_rng(0)
    distorted = [jitter_colours(image, rng, strength=0.5) for _ in range(500)]
    num_grey = sum(shown[0].equal(shown[1]) and shown[0].equal(shown[2]) for shown in distorted)
    assert 70 < num_grey < 130  # 100 on average, with a deviation of 9


def test_grey_pixels_change_in_brightness_alone():
    """Contrast, saturation and hue leave a uniform grey as it is: factors are within 1 ± 0.8 s."""
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    values = torch.stack([jitter_colours(image, rng, strength=0.5) for _ in range(300)]).float()
    assert values.flatten(1).std(dim=1).max() <= 1
    # two more for rounding at every step
    assert 58 <= values.min() < 65
    assert 135 < values.max() <= 142


def test_bytes_survive_as_pixels_and_what_is_beyond_the_range_is_cut_off():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    pixels = to_pixels(images)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert to_bytes(pixels).equal(images)
    beyond = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).expand(1, 3, 1, 5)
    assert to_bytes(beyond)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]
