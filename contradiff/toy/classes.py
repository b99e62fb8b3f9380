"""The twelve classes of the toy images: their usual colours, backgrounds and rotation."""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.random import Generator

from contradiff.toy.objects import DRAWINGS, Rgb, Shape

Hsv: TypeAlias = tuple[float, float, float]  # hue, saturation and value, each in [0, 1]

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


@dataclass(frozen=True)
class Scene:
    """A background whose colour changes from top to bottom, gradually or at a soft horizon."""

    top: Hsv
    bottom: Hsv
    has_horizon: bool


SCENES: dict[str, Scene] = {
    "sky": Scene((0.58, 0.55, 0.9), (0.54, 0.15, 0.98), has_horizon=False),
    "water": Scene((0.5, 0.45, 0.85), (0.6, 0.8, 0.45), has_horizon=False),
    "sea": Scene((0.56, 0.25, 0.95), (0.57, 0.65, 0.6), has_horizon=True),
    "meadow": Scene((0.55, 0.3, 0.95), (0.27, 0.55, 0.62), has_horizon=True),
    "beach": Scene((0.5, 0.4, 0.85), (0.11, 0.38, 0.88), has_horizon=True),
    "forest": Scene((0.27, 0.45, 0.55), (0.3, 0.55, 0.22), has_horizon=False),
    "night": Scene((0.66, 0.65, 0.14), (0.63, 0.55, 0.38), has_horizon=False),
    "dusk": Scene((0.74, 0.4, 0.5), (0.06, 0.55, 0.95), has_horizon=False),
    "room": Scene((0.1, 0.18, 0.84), (0.07, 0.5, 0.52), has_horizon=True),
    "street": Scene((0.58, 0.12, 0.86), (0.62, 0.06, 0.42), has_horizon=True),
    "sand": Scene((0.12, 0.28, 0.93), (0.09, 0.42, 0.76), has_horizon=False),
    "studio": Scene((0.6, 0.03, 0.86), (0.6, 0.05, 0.6), has_horizon=False),
}


@dataclass(frozen=True)
class ToyClass:
    """A class of the toy ImageNet, with its typical colours and backgrounds."""

    wnid: str  # name of the class's folder, in the style of WordNet
    name: str  # as in the file LOC_synset_mapping.txt of Kaggle
    draw: Callable[[Generator, Rgb, Rgb], list[Shape]]  # colours: main, accent
    palette: Sequence[str]  # main colours; a colour that occurs twice is twice as likely
    accents: Sequence[str]
    scenes: Sequence[str]
    tilt: float  # standard deviation of the rotation, in radians; inf: any angle


# name | main colours | accent colours | backgrounds | tilt
_TABLE = """
goldfish, fish | orange orange gold red snow | snow soot blue | water water sea | 0.25
butterfly | orange yellow sky violet snow | yellow snow soot pink | meadow forest sky | 0.5
mushroom, toadstool | red red brown clay cream | cream snow | forest forest meadow | 0.15
tree | green pine lime orange gold | brown brown slate | meadow meadow sky dusk | 0.06
house, cottage | cream snow clay sky gold | clay red slate brown | meadow street dusk | 0.05
sailboat, sailing boat | snow snow cream red gold | brown blue red snow | sea sea dusk | 0.14
sunflower, daisy | gold yellow yellow snow pink | brown soot gold | meadow sky forest | inf
cup, teacup | snow cream blue teal red | blue gold pink | room room studio | 0.08
starfish, sea star | orange red pink violet gold | cream yellow | sand water beach | inf
car, automobile | red blue snow slate teal yellow | yellow snow | street street beach meadow | 0.08
hot-air balloon | red yellow violet teal orange | yellow snow blue red | sky sky dusk | 0.12
crescent moon, crescent | yellow cream snow gold | yellow snow | night night dusk | 0.5
"""

CLASSES = tuple(
    ToyClass(f"n{90_000_001 + index}", name, draw, *map(str.split, lists), tilt=float(tilt))
    for index, (line, draw) in enumerate(zip(_TABLE.strip().splitlines(), DRAWINGS, strict=True))
    for name, *lists, tilt in [line.split(" | ")]
)


def vary(rng: Generator, colour: Hsv) -> Rgb:
    """Add noise to hue, saturation and value, and convert to RGB."""
    varied = colour + rng.normal(0.0, (0.025, 0.09, 0.07))
    varied[0] %= 1.0
    return np.array(colorsys.hsv_to_rgb(*varied.clip(0.0, 1.0)))


def pick(rng: Generator, names: Sequence[str]) -> Rgb:
    """Pick a random colour and vary it. A name that occurs twice is twice as likely."""
    return vary(rng, COLOURS[names[int(rng.integers(len(names)))]])
