"""Colours of the drawn images, and the chance in them."""

import colorsys
from collections.abc import Sequence
from typing import TypeAlias

from numpy.random import Generator

Rgb: TypeAlias = tuple[float, float, float]
Hsv: TypeAlias = tuple[float, float, float]

WHITE: Rgb = (0.96, 0.95, 0.92)
INK: Rgb = (0.10, 0.09, 0.10)
WOOD: Rgb = (0.45, 0.30, 0.18)
GLASS: Rgb = (0.66, 0.82, 0.90)

RED, ORANGE, GOLD, YELLOW = (
    (0.0, 0.8, 0.82),
    (0.06, 0.85, 0.95),
    (0.11, 0.8, 0.95),
    (0.15, 0.65, 0.97),
)
LIME, GREEN, PINE, TEAL = (
    (0.23, 0.65, 0.75),
    (0.32, 0.65, 0.6),
    (0.38, 0.55, 0.4),
    (0.48, 0.6, 0.65),
)
SKY, BLUE, VIOLET, PINK = (
    (0.55, 0.5, 0.9),
    (0.61, 0.75, 0.75),
    (0.77, 0.5, 0.7),
    (0.92, 0.45, 0.93),
)
CREAM, SNOW, SLATE = (0.12, 0.2, 0.93), (0.6, 0.04, 0.95), (0.6, 0.15, 0.45)
BROWN, CLAY, SOOT = (0.07, 0.6, 0.4), (0.04, 0.6, 0.62), (0.05, 0.3, 0.2)


def _rgb(colour: Hsv) -> Rgb:
    hue, saturation, value = colour
    return colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))


def varied(rng: Generator, colour: Hsv) -> Rgb:
    """The colour with some noise in hue, saturation and value."""
    hue, saturation, value = colour
    return _rgb(
        (
            hue + rng.normal(0.0, 0.025),
            saturation + rng.normal(0.0, 0.09),
            value + rng.normal(0.0, 0.07),
        )
    )


def scaled(colour: Rgb, factor: float) -> Rgb:
    """Lighter (factor above 1) or darker, in proportion; not clipped."""
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def mixed(first: Rgb, second: Rgb, share: float) -> Rgb:
    """`share` of the second colour and the rest of the first."""
    red, green, blue = (a + share * (b - a) for a, b in zip(first, second, strict=True))
    return (red, green, blue)


def pick(rng: Generator, options: Sequence[Hsv]) -> Hsv:
    """One of some colours, each as likely; named twice is twice as likely."""
    return options[int(rng.integers(len(options)))]
