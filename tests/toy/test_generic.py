"""The images that train the tiny base: the base never sees an object in its own colours."""

import numpy as np
from PIL import Image

from contradiff.toy.classes import CLASSES
from contradiff.toy.generic import render_shapes, render_tinted
from contradiff.toy.render import render_image


def test_a_tinted_image_is_an_image_of_a_class_with_other_hues_and_the_same_brightness():
    turns: list[float] = []
    for number in range(20):
        drawn = render_tinted(np.random.default_rng(number), image_size=32)
        rng = np.random.default_rng(number)
        image = render_image(int(rng.integers(len(CLASSES))), rng, image_size=32)
        before, after = (np.array(Image.fromarray(x).convert("HSV"), int) for x in (image, drawn))
        assert np.abs(before[..., 2] - after[..., 2]).max() <= 2
        is_coloured = (before[..., 1] > 100) & (before[..., 2] > 100)
        turn = (after[..., 0] - before[..., 0])[is_coloured] % 256 / 256
        assert np.ptp(turn) < 0.06  # one turn for the whole image; HSV of bytes is rounded
        turns.append(float(np.median(turn)))
    assert 1 / 6 - 0.03 < min(turns) < 0.35
    assert 0.65 < max(turns) < 5 / 6 + 0.03


def test_shapes_depend_on_the_generator_alone():
    first, again, other = (
        render_shapes(np.random.default_rng(seed), image_size=32) for seed in (0, 0, 1)
    )
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
