"""Colours of the rendered images, and how they vary."""

import colorsys
from collections.abc import Sequence
from typing import TypeAlias

from numpy.random import Generator

Rgb: TypeAlias = tuple[float, float, float]
"""Red, green and blue, each in [0, 1]."""

Hsv: TypeAlias = tuple[float, float, float]
"""Hue, saturation and value, each in [0, 1]."""

WHITE: Rgb = (0.96, 0.95, 0.92)
INK: Rgb = (0.10, 0.09, 0.10)
WOOD: Rgb = (0.45, 0.30, 0.18)
GLASS: Rgb = (0.66, 0.82, 0.90)

COLOURS: dict[str, Hsv] = {
    "red": (0.0, 0.8, 0.82),
    "orange": (0.06, 0.85, 0.95),
    "gold": (0.11, 0.8, 0.95),
    "yellow": (0.15, 0.65, 0.97),
    "lime": (0.23, 0.65, 0.75),
    "green": (0.32, 0.65, 0.6),
    "pine": (0.38, 0.55, 0.4),
    "teal": (0.48, 0.6, 0.65),
    "sky": (0.55, 0.5, 0.9),
    "blue": (0.61, 0.75, 0.75),
    "violet": (0.77, 0.5, 0.7),
    "pink": (0.92, 0.45, 0.93),
    "cream": (0.12, 0.2, 0.93),
    "snow": (0.6, 0.04, 0.95),
    "slate": (0.6, 0.15, 0.45),
    "brown": (0.07, 0.6, 0.4),
    "clay": (0.04, 0.6, 0.62),
    "soot": (0.05, 0.3, 0.2),
}


def vary(rng: Generator, colour: Hsv) -> Rgb:
    """Add noise to hue, saturation and value."""
    hue, saturation, value = (
        channel + rng.normal(0.0, spread)
        for channel, spread in zip(colour, (0.025, 0.09, 0.07), strict=True)
    )
    return colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))


def pick(rng: Generator, names: Sequence[str]) -> Rgb:
    """Pick a colour by chance and vary it; a name that occurs twice is twice as likely."""
    return vary(rng, COLOURS[names[int(rng.integers(len(names)))]])


def scale(colour: Rgb, factor: float) -> Rgb:
    """Make a colour darker (factor below 1) or lighter; the result is not clipped."""
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """Mix two colours; `share` is the second one's."""
    red, green, blue = (a + share * (b - a) for a, b in zip(first, second, strict=True))
    return (red, green, blue)
