"""Figures: the same inputs give the same bytes, light and dark."""

import io

import numpy as np
from PIL import Image

from contradiff.report.figures import plot_embeddings, plot_losses
from contradiff.report.results import CURVES


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_embeddings_are_deterministic_and_shown_side_by_side():
    rng = np.random.default_rng(0)
    positions, labels = rng.normal(size=(40, 2)), rng.integers(0, 3, 40)
    panels = {"left": positions, "right": positions[::-1].copy()}
    png = plot_embeddings(panels, labels, dark=False)
    assert plot_embeddings(panels, labels, dark=False) == png
    assert b"matplotlib" not in png.lower()
    other = {"left": panels["right"], "right": panels["left"]}
    assert plot_embeddings(other, labels, dark=False) != png
    light, dark = pixels_of(png), pixels_of(plot_embeddings(panels, labels, dark=True))
    assert light.shape[1] > 1.7 * light.shape[0]
    assert np.median(light) > 250
    assert np.median(dark) < 40


def test_losses_have_no_panel_for_an_empty_column():
    curve = {name: 1 / np.arange(1.0, 38.0) for name in ("step", *CURVES)}
    darkest: list[int] = []
    for values in (curve["loss"], np.full(37, np.nan)):
        png = plot_losses(curve | {"contrastive": values}, dark=False)
        assert png == plot_losses(curve | {"contrastive": values}, dark=False)
        darkest.append(pixels_of(png)[420:700, 760:1400].min())  # the fourth panel
    assert darkest[0] < darkest[1] == 255


def test_losses_of_one_step_are_drawn():
    empty = {name: np.empty(0) for name in ("step", *CURVES)}
    curve = {name: np.ones(1) for name in empty}
    assert plot_losses(curve, dark=True) != plot_losses(empty, dark=True)
