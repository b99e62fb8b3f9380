"""Against Pillow and by hand."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from contradiff.data.png import LiveGrid, encode_png, image_grid


def random_image(seed: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8)


def read(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.array(image)


def test_png_is_lossless():
    image = random_image(0, 24)
    np.testing.assert_array_equal(read(encode_png(image)), image.permute(1, 2, 0))


def test_grid_has_the_images_in_reading_order():
    images = [random_image(seed, 64) for seed in range(5)]
    grid = read(image_grid([encode_png(image) for image in images], columns=3))
    assert grid.shape == (2 * 64, 3 * 64, 3)
    for number, image in enumerate(images):
        row, column = divmod(number, 3)
        shown = grid[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
        np.testing.assert_array_equal(shown, image.permute(1, 2, 0))
    assert (grid[64:, 128:] == 255).all()


@pytest.mark.parametrize(("side", "factor"), [(16, 4), (24, 3), (64, 1), (80, 1)])
def test_small_images_are_magnified_without_smoothing(side: int, factor: int):
    image = random_image(1, side)
    grid = read(image_grid([encode_png(image)], columns=1))
    expected = np.kron(image.permute(1, 2, 0).numpy(), np.ones((factor, factor, 1), np.uint8))
    np.testing.assert_array_equal(grid, expected)


def test_live_grid_shows_the_newest_images_and_is_renewed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    images = [encode_png(random_image(seed, 64)) for seed in range(7)]
    path = tmp_path / "preview.png"
    grid = LiveGrid(path, columns=2, max_images=4, seconds=10.0)
    grid.add(images[:2])
    assert path.read_bytes() == image_grid(images[:2], columns=2)
    now = 9.9
    grid.add(images[2:4])
    assert path.read_bytes() == image_grid(images[:2], columns=2)
    now = 10.0
    grid.add(images[4:])
    assert path.read_bytes() == image_grid(images[3:], columns=2)
    assert [item.name for item in tmp_path.iterdir()] == ["preview.png"]
