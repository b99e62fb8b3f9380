"""The twelve classes: what each tends to look like, and before which background."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from numpy.random import Generator

from contradiff.toy.colours import (
    BLUE,
    BROWN,
    CLAY,
    CREAM,
    GOLD,
    GREEN,
    LIME,
    ORANGE,
    PINE,
    PINK,
    RED,
    SKY,
    SLATE,
    SNOW,
    SOOT,
    TEAL,
    VIOLET,
    YELLOW,
    Hsv,
    Rgb,
)
from contradiff.toy.objects import (
    Part,
    balloon,
    butterfly,
    car,
    cup,
    goldfish,
    house,
    moon,
    mushroom,
    sailboat,
    starfish,
    sunflower,
    tree,
)


@dataclass(frozen=True)
class Scene:
    """A background: two shades graded from top to bottom, or sky and ground with a soft horizon."""

    top: Hsv
    bottom: Hsv
    has_horizon: bool


@dataclass(frozen=True)
class ToyClass:
    """A class of the drawn ImageNet.

    Attributes:
        wnid: Folder name, in the manner of a WordNet identifier.
        name: Names as in Kaggle's LOC_synset_mapping.txt, separated by commas.
        draw: Parts from back to front, given a generator, a main and an accent colour.
        palette: Typical main colours (hue, saturation, value), each in [0, 1].
        accents: Typical accent colours.
        scenes: Names of the typical backgrounds.
        tilt: Standard deviation of the rotation, in radians; `math.inf` is any angle.
    """

    wnid: str
    name: str
    draw: Callable[[Generator, Rgb, Rgb], list[Part]]
    palette: tuple[Hsv, ...]
    accents: tuple[Hsv, ...]
    scenes: tuple[str, ...]
    tilt: float


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

CLASSES: tuple[ToyClass, ...] = (
    ToyClass(
        wnid="n90000001",
        name="goldfish, fish",
        draw=goldfish,
        palette=(ORANGE, ORANGE, GOLD, RED, SNOW),
        accents=(SNOW, SOOT, BLUE),
        scenes=("water", "water", "sea"),
        tilt=0.25,
    ),
    ToyClass(
        wnid="n90000002",
        name="butterfly",
        draw=butterfly,
        palette=(ORANGE, YELLOW, SKY, VIOLET, SNOW),
        accents=(YELLOW, SNOW, SOOT, PINK),
        scenes=("meadow", "forest", "sky"),
        tilt=0.5,
    ),
    ToyClass(
        wnid="n90000003",
        name="mushroom, toadstool",
        draw=mushroom,
        palette=(RED, RED, BROWN, CLAY, CREAM),
        accents=(CREAM, SNOW),
        scenes=("forest", "forest", "meadow"),
        tilt=0.15,
    ),
    ToyClass(
        wnid="n90000004",
        name="tree",
        draw=tree,
        palette=(GREEN, PINE, LIME, ORANGE, GOLD),
        accents=(BROWN, BROWN, SLATE),
        scenes=("meadow", "meadow", "sky", "dusk"),
        tilt=0.06,
    ),
    ToyClass(
        wnid="n90000005",
        name="house, cottage",
        draw=house,
        palette=(CREAM, SNOW, CLAY, SKY, GOLD),
        accents=(CLAY, RED, SLATE, BROWN),
        scenes=("meadow", "street", "dusk"),
        tilt=0.05,
    ),
    ToyClass(
        wnid="n90000006",
        name="sailboat, sailing boat",
        draw=sailboat,
        palette=(SNOW, SNOW, CREAM, RED, GOLD),
        accents=(BROWN, BLUE, RED, SNOW),
        scenes=("sea", "sea", "dusk"),
        tilt=0.14,
    ),
    ToyClass(
        wnid="n90000007",
        name="sunflower, daisy",
        draw=sunflower,
        palette=(GOLD, YELLOW, YELLOW, SNOW, PINK),
        accents=(BROWN, SOOT, GOLD),
        scenes=("meadow", "sky", "forest"),
        tilt=math.inf,
    ),
    ToyClass(
        wnid="n90000008",
        name="cup, teacup",
        draw=cup,
        palette=(SNOW, CREAM, BLUE, TEAL, RED),
        accents=(BLUE, GOLD, PINK),
        scenes=("room", "room", "studio"),
        tilt=0.08,
    ),
    ToyClass(
        wnid="n90000009",
        name="starfish, sea star",
        draw=starfish,
        palette=(ORANGE, RED, PINK, VIOLET, GOLD),
        accents=(CREAM, YELLOW),
        scenes=("sand", "water", "beach"),
        tilt=math.inf,
    ),
    ToyClass(
        wnid="n90000010",
        name="car, automobile",
        draw=car,
        palette=(RED, BLUE, SNOW, SLATE, TEAL, YELLOW),
        accents=(YELLOW, SNOW),
        scenes=("street", "street", "beach", "meadow"),
        tilt=0.08,
    ),
    ToyClass(
        wnid="n90000011",
        name="hot-air balloon",
        draw=balloon,
        palette=(RED, YELLOW, VIOLET, TEAL, ORANGE),
        accents=(YELLOW, SNOW, BLUE, RED),
        scenes=("sky", "sky", "dusk"),
        tilt=0.12,
    ),
    ToyClass(
        wnid="n90000012",
        name="crescent moon, crescent",
        draw=moon,
        palette=(YELLOW, CREAM, SNOW, GOLD),
        accents=(YELLOW, SNOW),
        scenes=("night", "night", "dusk"),
        tilt=0.5,
    ),
)
