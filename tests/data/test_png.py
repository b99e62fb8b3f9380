"""Against Pillow and by hand."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from contradiff.data.png import LiveGrid, image_grid, paired_grid


def random_images(number: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (number, 3, side, side), generator=generator, dtype=torch.uint8)


def read(content: bytes) -> Tensor:
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cells(grid: Tensor) -> Tensor:
    """A grid of images of 64 pixels: rows, columns, 3, 64, 64."""
    rows, columns = grid.shape[1] // 64, grid.shape[2] // 64
    return grid.unflatten(2, (columns, 64)).unflatten(1, (rows, 64)).permute(1, 3, 0, 2, 4)


def test_grid_has_the_images_in_reading_order():
    images = random_images(5, 64)
    grid = cells(read(image_grid(images, columns=3)))
    assert grid.shape[:2] == (2, 3)
    assert grid.flatten(0, 1)[:5].equal(images)
    assert (grid[1, 2] == 255).all()


@pytest.mark.parametrize("number", [3, 4, 6])
def test_every_image_stands_above_its_counterpart(number: int):
    images = random_images(2 * number, 64)
    grid = cells(read(paired_grid(images[:number], images[number:], columns=4)))
    assert grid[::2].flatten(0, 1)[:number].equal(images[:number])
    assert grid[1::2].flatten(0, 1)[:number].equal(images[number:])
    assert (grid.permute(1, 0, 2, 3, 4)[number % 4 or 4 :, -2:] == 255).all()


@pytest.mark.parametrize(("side", "factor"), [(16, 4), (24, 3), (80, 1)])
def test_small_images_are_magnified_without_smoothing(side: int, factor: int):
    image = random_images(1, side)
    expected = np.kron(image[0].numpy(), np.ones((factor, factor), np.uint8))
    np.testing.assert_array_equal(read(image_grid(image, columns=1)), expected)


def test_live_grid_shows_the_newest_images_and_is_renewed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    images, path = random_images(7, 64), tmp_path / "preview.png"
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
