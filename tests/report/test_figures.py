"""Figures: the same inputs give the same bytes, light and dark."""

import io

import numpy as np
from PIL import Image

from contradiff.report.figures import plot_embeddings


def test_embeddings_are_deterministic_and_shown_side_by_side():
    rng = np.random.default_rng(0)
    positions, labels = rng.normal(size=(40, 2)), rng.integers(0, 3, 40)
    panels = {"left": positions, "right": positions[::-1].copy()}
    png = plot_embeddings(panels, labels, dark=False)
    assert plot_embeddings(panels, labels, dark=False) == png
    assert b"matplotlib" not in png.lower()
    other = {"left": panels["right"], "right": panels["left"]}
    assert plot_embeddings(other, labels, dark=False) != png
    light, dark = (
        np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        for content in (png, plot_embeddings(panels, labels, dark=True))
    )
    assert light.shape[1] > 1.7 * light.shape[0]
    assert np.median(light) > 250
    assert np.median(dark) < 40
