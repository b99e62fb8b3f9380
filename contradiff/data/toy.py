"""A small drawn ImageNet: twelve classes of objects before natural-looking backgrounds.

The tree has the layout of ImageNet's classification task as it is unpacked from Kaggle, so that
one reader serves both. A class has *tendencies* in outline, colour and background, none of which
determines it, and every image varies in position, scale, rotation and light, and sometimes shows
a distractor or an occluder. Objects are large and backgrounds soft, since a first stage with f = 4
leaves a 32-pixel image only 8 x 8 latent cells.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from contradiff.atomic import replace_dir

Outline: TypeAlias = Float64[np.ndarray, "_points 2"]
Plane: TypeAlias = Float32[np.ndarray, "height width"]
Picture: TypeAlias = Float32[np.ndarray, "height width 3"]
Rgb: TypeAlias = tuple[float, float, float]
Hsv: TypeAlias = tuple[float, float, float]

SUPERSAMPLING = 4
JPEG_QUALITY = 92
MAPPING_NAME = "LOC_synset_mapping.txt"
# How often an image follows its class's own tendency rather than that of any class.
OWN_PALETTE_RATE = 0.7
OWN_SCENE_RATE = 0.65
DISTRACTOR_RATE = 0.2
OCCLUDER_RATE = 0.15

_WHITE: Rgb = (0.96, 0.95, 0.92)
_INK: Rgb = (0.10, 0.09, 0.10)
_WOOD: Rgb = (0.45, 0.30, 0.18)
_GLASS: Rgb = (0.66, 0.82, 0.90)


@dataclass(frozen=True)
class _Part:
    """One filled outline, in the object's own frame: x right and y down, both about -1 to 1."""

    outline: Outline
    colour: Rgb


@dataclass(frozen=True)
class _Scene:
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
    draw: Callable[[Generator, Rgb, Rgb], list[_Part]]
    palette: tuple[Hsv, ...]
    accents: tuple[Hsv, ...]
    scenes: tuple[str, ...]
    tilt: float


# --- Outlines -----------------------------------------------------------------------------------


def _polygon(*points: tuple[float, float]) -> Outline:
    return np.array(points, dtype=np.float64)


def _mirrored(outline: Outline) -> Outline:
    return outline * np.array([-1.0, 1.0])


def _smooth(*points: tuple[float, float]) -> Outline:
    """A closed polygon with its corners cut thrice (Chaikin), nearly a quadratic B-spline."""
    outline = _polygon(*points)
    for _ in range(3):
        following = np.roll(outline, -1, axis=0)
        cut = np.stack([0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following], 1)
        outline = cut.reshape(-1, 2)
    return outline


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Outline:
    angle = np.linspace(0.0, 2 * math.pi, 32, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    cos, sin = math.cos(tilt), math.sin(tilt)
    return np.stack([x + u * cos - v * sin, y + u * sin + v * cos], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> Outline:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _handle(x: float, y: float, *, outer: float, inner: float) -> Outline:
    """A thick arc, open to the left."""
    angle = np.linspace(-1.9, 1.9, 20)
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.array([x, y]) + np.concatenate([outer * ray, inner * ray[::-1]])


def _lobed(lobes: int, inner: float, sharpness: float) -> Outline:
    """A star-like outline, its radius between `inner` and 1; greater sharpness, thinner lobes."""
    angle = np.linspace(0.0, 2 * math.pi, 16 * lobes, endpoint=False)
    wave = (0.5 + 0.5 * np.cos(lobes * angle)) ** sharpness
    radius = inner + (1.0 - inner) * wave
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


# --- Colours ------------------------------------------------------------------------------------


def _rgb(colour: Hsv) -> Rgb:
    hue, saturation, value = colour
    return colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))


def _varied(rng: Generator, colour: Hsv) -> Rgb:
    """The colour with some noise in hue, saturation and value."""
    hue, saturation, value = colour
    return _rgb(
        (
            hue + rng.normal(0.0, 0.025),
            saturation + rng.normal(0.0, 0.09),
            value + rng.normal(0.0, 0.07),
        )
    )


def _scaled(colour: Rgb, factor: float) -> Rgb:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _mixed(first: Rgb, second: Rgb, share: float) -> Rgb:
    """`share` of the second colour and the rest of the first."""
    red, green, blue = (a + share * (b - a) for a, b in zip(first, second, strict=True))
    return (red, green, blue)


def _pick(rng: Generator, options: Sequence[Hsv]) -> Hsv:
    return options[int(rng.integers(len(options)))]


# --- Objects ------------------------------------------------------------------------------------


def _goldfish(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    height = rng.uniform(0.38, 0.56)
    fork = rng.uniform(0.5, 0.7)
    fin = _scaled(main, 0.78)
    tail = _smooth(
        (-0.25, 0.0), (-0.95, -fork), (-1.05, -fork), (-0.78, 0.0), (-1.05, fork), (-0.95, fork)
    )
    dorsal = _smooth((-0.35, -0.3), (-0.2, -height - 0.3), (0.15, -height - 0.2), (0.45, -0.25))
    parts = [
        _Part(tail, fin),
        _Part(dorsal, fin),
        _Part(_ellipse(0.2, 0.0, 0.78, height), main),
        _Part(_ellipse(0.2, 0.45 * height, 0.55, 0.42 * height), _mixed(main, _WHITE, 0.4)),
    ]
    if rng.random() < 0.4:
        parts.append(_Part(_ellipse(0.12, 0.0, 0.13, 0.88 * height), accent))
    return [
        *parts,
        _Part(_ellipse(0.62, -0.12, 0.15, 0.15), _WHITE),
        _Part(_ellipse(0.64, -0.12, 0.09, 0.09), _INK),
    ]


def _butterfly(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    upper_tilt, lower_size = rng.uniform(0.4, 0.8), rng.uniform(0.34, 0.46)
    upper = _ellipse(0.52, -0.36, 0.56, rng.uniform(0.36, 0.46), -upper_tilt)
    lower = _ellipse(0.4, 0.42, lower_size, lower_size + 0.06, -0.4)
    spots = [_ellipse(0.6, -0.42, 0.24, 0.18, -upper_tilt), _ellipse(0.44, 0.46, 0.17, 0.17)]
    hind, rim = _scaled(main, 0.82), _scaled(main, 0.45)
    parts: list[_Part] = []
    for side in (upper, _mirrored(upper)):
        parts += [_Part(side, rim), _Part(side * 0.88, main)]
    parts += [_Part(lower, hind), _Part(_mirrored(lower), hind)]
    parts += [_Part(side, accent) for spot in spots for side in (spot, _mirrored(spot))]
    return [*parts, _Part(_ellipse(0.0, 0.0, 0.11, 0.66), _INK)]


def _mushroom(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    half, rise = rng.uniform(0.78, 0.98), rng.uniform(0.7, 1.0)
    stem_half = rng.uniform(0.2, 0.34)
    stem = _smooth(
        (-stem_half, -0.2), (stem_half, -0.2), (stem_half * 1.5, 0.98), (-stem_half * 1.5, 0.98)
    )
    cap = _smooth(
        (-half, 0.25),
        (-half, -0.3),
        (-0.5, -rise - 0.1),
        (0.5, -rise - 0.1),
        (half, -0.3),
        (half, 0.25),
    )
    parts = [
        _Part(stem, _mixed(accent, _WHITE, 0.7)),
        _Part(_ellipse(0.0, 0.02, half * 0.72, 0.17), _scaled(_mixed(accent, _WHITE, 0.5), 0.75)),
        _Part(cap, main),
    ]
    if rng.random() < 0.65:
        spot = _mixed(accent, _WHITE, 0.8)
        radius = rng.uniform(0.11, 0.16)
        for x, y in ((-0.48, -0.2), (0.06, -0.52 * rise), (0.5, -0.16)):
            parts.append(_Part(_ellipse(x, y, radius * 1.15, radius), spot))
    return parts


def _tree(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    trunk_half = rng.uniform(0.09, 0.16)
    trunk = _polygon(
        (-trunk_half, 0.0), (trunk_half, 0.0), (trunk_half * 1.4, 1.0), (-trunk_half * 1.4, 1.0)
    )
    parts = [_Part(trunk, accent)]
    if rng.random() < 0.35:
        for level, (y, half) in enumerate(((0.62, 0.78), (0.12, 0.62), (-0.36, 0.45))):
            tier = _polygon((-half, y), (half, y), (0.0, y - 0.78))
            parts.append(_Part(tier, _scaled(main, 0.8 + 0.12 * level)))
        return parts
    half = rng.uniform(0.42, 0.54)
    parts += [
        _Part(_ellipse(-0.4, -0.12, half, 0.44), _scaled(main, 0.85)),
        _Part(_ellipse(0.4, -0.1, half, 0.42), _scaled(main, 0.78)),
        _Part(_ellipse(rng.uniform(-0.12, 0.12), -0.45, half + 0.08, 0.52), main),
    ]
    return parts


def _house(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    half, eaves = rng.uniform(0.68, 0.82), rng.uniform(-0.2, 0.02)
    ridge = rng.uniform(0.0, 0.35)
    roof = _polygon((-half - 0.2, eaves), (-ridge, -0.92), (ridge, -0.92), (half + 0.2, eaves))
    parts: list[_Part] = []
    if rng.random() < 0.5:
        parts.append(_Part(_box(0.36, -0.95, 0.58, -0.3), _scaled(main, 0.6)))
    door = rng.uniform(-0.4, 0.0)
    return [
        *parts,
        _Part(_box(-half, eaves - 0.02, half, 0.9), main),
        _Part(roof, accent),
        _Part(_box(door - 0.17, 0.3, door + 0.17, 0.9), _scaled(accent, 0.6)),
        _Part(_box(0.2, 0.18, 0.54, 0.52), _GLASS),
    ]


def _sailboat(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    mast, top = rng.uniform(-0.15, 0.1), rng.uniform(-1.0, -0.85)
    belly = rng.uniform(0.2, 0.5)
    sail = _polygon((mast + 0.06, top), (mast + belly, -0.2), (0.82, 0.34), (mast + 0.06, 0.34))
    jib = _polygon((mast - 0.08, top + 0.2), (mast - 0.08, 0.34), (-0.85, 0.34))
    hull = _polygon((-0.95, 0.48), (0.98, 0.44), (0.66, 0.88), (-0.62, 0.9))
    jib_colour = main if rng.random() < 0.5 else _mixed(main, _WHITE, 0.6)
    return [
        _Part(_box(mast - 0.04, top, mast + 0.05, 0.6), _scaled(_WOOD, 0.8)),
        _Part(sail, main),
        _Part(jib, jib_colour),
        _Part(hull, accent),
        _Part(_box(-0.86, 0.46, 0.9, 0.56), _mixed(accent, _WHITE, 0.45)),
    ]


def _sunflower(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    lobes = int(rng.integers(6, 11))
    petals = _lobed(lobes, rng.uniform(0.55, 0.68), 0.6)
    core = rng.uniform(0.34, 0.48)
    turn = math.pi / lobes
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return [
        _Part(petals @ rotation, _scaled(main, 0.75)),
        _Part(petals * 0.94, main),
        _Part(_ellipse(0.0, 0.0, core, core), accent),
        _Part(_ellipse(0.0, 0.0, core * 0.6, core * 0.6), _scaled(accent, 0.65)),
    ]


def _cup(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    top, foot = rng.uniform(0.6, 0.75), rng.uniform(0.36, 0.62)
    brim = rng.uniform(-0.7, -0.5)
    body = _polygon((-top, brim), (top, brim), (foot, 0.75), (-foot, 0.75))
    parts = [
        _Part(_ellipse(0.0, 0.78, 0.9, 0.16), _scaled(_mixed(main, _WHITE, 0.3), 0.9)),
        _Part(_handle(top - 0.06, 0.0, outer=0.44, inner=0.25), _scaled(main, 0.85)),
        _Part(body, main),
    ]
    if rng.random() < 0.4:
        half = 0.5 * (top + foot) + 0.02
        parts.append(_Part(_box(-half, -0.1, half, 0.2), accent))
    return [
        *parts,
        _Part(_ellipse(0.0, 0.75, foot, 0.1), main),
        _Part(_ellipse(0.0, brim, top, 0.2), _mixed(main, _WHITE, 0.5)),
        _Part(_ellipse(0.0, brim + 0.02, top * 0.84, 0.14), (0.28, 0.17, 0.10)),
    ]


def _starfish(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    arms = _lobed(5, rng.uniform(0.28, 0.42), rng.uniform(0.9, 1.5))
    parts = [_Part(arms, _scaled(main, 0.85)), _Part(arms * 0.78, _mixed(main, accent, 0.25))]
    if rng.random() < 0.5:
        for arm in range(5):
            angle = 2 * math.pi * arm / 5
            x, y = 0.42 * math.sin(angle), -0.42 * math.cos(angle)
            parts.append(_Part(_ellipse(x, y, 0.09, 0.09), _mixed(accent, _WHITE, 0.3)))
    return parts


def _car(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    roof, rear = rng.uniform(-0.62, -0.45), rng.uniform(-0.75, -0.5)
    front = rng.uniform(0.3, 0.55)
    wheel = rng.uniform(0.22, 0.28)
    cabin = _polygon((rear, -0.02), (rear + 0.2, roof), (front - 0.2, roof), (front + 0.1, -0.02))
    panes = _polygon(
        (rear + 0.12, -0.04),
        (rear + 0.26, roof + 0.1),
        (front - 0.24, roof + 0.1),
        (front - 0.04, -0.04),
    )
    body = _smooth(
        (-1.02, 0.05),
        (-0.9, -0.1),
        (0.0, -0.08),
        (0.8, -0.06),
        (1.05, 0.1),
        (1.05, 0.45),
        (-1.05, 0.45),
    )
    parts = [_Part(cabin, _scaled(main, 0.92)), _Part(panes, _GLASS), _Part(body, main)]
    middle = 0.5 * (rear + front)
    parts.append(_Part(_box(middle - 0.04, roof + 0.05, middle + 0.04, 0.0), main))
    parts.append(_Part(_ellipse(0.94, 0.12, 0.09, 0.09), _mixed(accent, _WHITE, 0.6)))
    for x in (-0.56, 0.56):
        parts.append(_Part(_ellipse(x, 0.42, wheel, wheel), _INK))
        parts.append(_Part(_ellipse(x, 0.42, wheel * 0.5, wheel * 0.5), (0.7, 0.7, 0.72)))
    return parts


def _balloon(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    half = rng.uniform(0.6, 0.74)
    envelope = _smooth(
        (-half, -0.95),
        (half, -0.95),
        (half + 0.08, -0.2),
        (0.1, 0.62),
        (-0.1, 0.62),
        (-half - 0.08, -0.2),
    )
    gore = _smooth(
        (-0.28, -0.92), (0.28, -0.92), (0.34, -0.2), (0.06, 0.58), (-0.06, 0.58), (-0.34, -0.2)
    )
    parts = [
        _Part(_polygon((-0.2, 0.3), (0.2, 0.3), (0.16, 0.8), (-0.16, 0.8)), _scaled(accent, 0.5)),
        _Part(envelope, main),
    ]
    if rng.random() < 0.6:
        parts.append(_Part(gore, accent))
    return [*parts, _Part(_box(-0.19, 0.72, 0.19, 1.0), _WOOD)]


def _moon(rng: Generator, main: Rgb, accent: Rgb) -> list[_Part]:
    # The inner arc is that of a circle shifted right; both meet at the horns.
    horn = rng.uniform(0.75, 1.25)
    shift = rng.uniform(0.42, 0.68)
    outer_angle = np.linspace(horn, 2 * math.pi - horn, 32)
    outer = np.stack([np.cos(outer_angle), np.sin(outer_angle)], axis=1)
    centre = math.cos(horn) + shift - 0.35
    reach = math.atan2(math.sin(horn), math.cos(horn) - centre)
    radius = math.hypot(math.sin(horn), math.cos(horn) - centre)
    inner_angle = np.linspace(2 * math.pi - reach, reach, 32)
    inner = np.stack([centre + radius * np.cos(inner_angle), radius * np.sin(inner_angle)], axis=1)
    crescent = np.concatenate([outer, inner]) + np.array([0.2, 0.0])
    parts = [_Part(crescent, main)]
    if rng.random() < 0.4:
        star = _lobed(5, 0.35, 1.2) * 0.24 + np.array([0.6, rng.uniform(-0.3, 0.3)])
        parts.append(_Part(star, _mixed(accent, _WHITE, 0.5)))
    return parts


_RED, _ORANGE, _GOLD, _YELLOW = (
    (0.0, 0.8, 0.82),
    (0.06, 0.85, 0.95),
    (0.11, 0.8, 0.95),
    (0.15, 0.65, 0.97),
)
_LIME, _GREEN, _PINE, _TEAL = (
    (0.23, 0.65, 0.75),
    (0.32, 0.65, 0.6),
    (0.38, 0.55, 0.4),
    (0.48, 0.6, 0.65),
)
_SKY, _BLUE, _VIOLET, _PINK = (
    (0.55, 0.5, 0.9),
    (0.61, 0.75, 0.75),
    (0.77, 0.5, 0.7),
    (0.92, 0.45, 0.93),
)
_CREAM, _SNOW, _SLATE = (0.12, 0.2, 0.93), (0.6, 0.04, 0.95), (0.6, 0.15, 0.45)
_BROWN, _CLAY, _SOOT = (0.07, 0.6, 0.4), (0.04, 0.6, 0.62), (0.05, 0.3, 0.2)

_SCENES: dict[str, _Scene] = {
    "sky": _Scene((0.58, 0.55, 0.9), (0.54, 0.15, 0.98), has_horizon=False),
    "water": _Scene((0.5, 0.45, 0.85), (0.6, 0.8, 0.45), has_horizon=False),
    "sea": _Scene((0.56, 0.25, 0.95), (0.57, 0.65, 0.6), has_horizon=True),
    "meadow": _Scene((0.55, 0.3, 0.95), (0.27, 0.55, 0.62), has_horizon=True),
    "beach": _Scene((0.5, 0.4, 0.85), (0.11, 0.38, 0.88), has_horizon=True),
    "forest": _Scene((0.27, 0.45, 0.55), (0.3, 0.55, 0.22), has_horizon=False),
    "night": _Scene((0.66, 0.65, 0.14), (0.63, 0.55, 0.38), has_horizon=False),
    "dusk": _Scene((0.74, 0.4, 0.5), (0.06, 0.55, 0.95), has_horizon=False),
    "room": _Scene((0.1, 0.18, 0.84), (0.07, 0.5, 0.52), has_horizon=True),
    "street": _Scene((0.58, 0.12, 0.86), (0.62, 0.06, 0.42), has_horizon=True),
    "sand": _Scene((0.12, 0.28, 0.93), (0.09, 0.42, 0.76), has_horizon=False),
    "studio": _Scene((0.6, 0.03, 0.86), (0.6, 0.05, 0.6), has_horizon=False),
}

CLASSES: tuple[ToyClass, ...] = (
    ToyClass(
        wnid="n90000001",
        name="goldfish, fish",
        draw=_goldfish,
        palette=(_ORANGE, _ORANGE, _GOLD, _RED, _SNOW),
        accents=(_SNOW, _SOOT, _BLUE),
        scenes=("water", "water", "sea"),
        tilt=0.25,
    ),
    ToyClass(
        wnid="n90000002",
        name="butterfly",
        draw=_butterfly,
        palette=(_ORANGE, _YELLOW, _SKY, _VIOLET, _SNOW),
        accents=(_YELLOW, _SNOW, _SOOT, _PINK),
        scenes=("meadow", "forest", "sky"),
        tilt=0.5,
    ),
    ToyClass(
        wnid="n90000003",
        name="mushroom, toadstool",
        draw=_mushroom,
        palette=(_RED, _RED, _BROWN, _CLAY, _CREAM),
        accents=(_CREAM, _SNOW),
        scenes=("forest", "forest", "meadow"),
        tilt=0.15,
    ),
    ToyClass(
        wnid="n90000004",
        name="tree",
        draw=_tree,
        palette=(_GREEN, _PINE, _LIME, _ORANGE, _GOLD),
        accents=(_BROWN, _BROWN, _SLATE),
        scenes=("meadow", "meadow", "sky", "dusk"),
        tilt=0.06,
    ),
    ToyClass(
        wnid="n90000005",
        name="house, cottage",
        draw=_house,
        palette=(_CREAM, _SNOW, _CLAY, _SKY, _GOLD),
        accents=(_CLAY, _RED, _SLATE, _BROWN),
        scenes=("meadow", "street", "dusk"),
        tilt=0.05,
    ),
    ToyClass(
        wnid="n90000006",
        name="sailboat, sailing boat",
        draw=_sailboat,
        palette=(_SNOW, _SNOW, _CREAM, _RED, _GOLD),
        accents=(_BROWN, _BLUE, _RED, _SNOW),
        scenes=("sea", "sea", "dusk"),
        tilt=0.14,
    ),
    ToyClass(
        wnid="n90000007",
        name="sunflower, daisy",
        draw=_sunflower,
        palette=(_GOLD, _YELLOW, _YELLOW, _SNOW, _PINK),
        accents=(_BROWN, _SOOT, _GOLD),
        scenes=("meadow", "sky", "forest"),
        tilt=math.inf,
    ),
    ToyClass(
        wnid="n90000008",
        name="cup, teacup",
        draw=_cup,
        palette=(_SNOW, _CREAM, _BLUE, _TEAL, _RED),
        accents=(_BLUE, _GOLD, _PINK),
        scenes=("room", "room", "studio"),
        tilt=0.08,
    ),
    ToyClass(
        wnid="n90000009",
        name="starfish, sea star",
        draw=_starfish,
        palette=(_ORANGE, _RED, _PINK, _VIOLET, _GOLD),
        accents=(_CREAM, _YELLOW),
        scenes=("sand", "water", "beach"),
        tilt=math.inf,
    ),
    ToyClass(
        wnid="n90000010",
        name="car, automobile",
        draw=_car,
        palette=(_RED, _BLUE, _SNOW, _SLATE, _TEAL, _YELLOW),
        accents=(_YELLOW, _SNOW),
        scenes=("street", "street", "beach", "meadow"),
        tilt=0.08,
    ),
    ToyClass(
        wnid="n90000011",
        name="hot-air balloon",
        draw=_balloon,
        palette=(_RED, _YELLOW, _VIOLET, _TEAL, _ORANGE),
        accents=(_YELLOW, _SNOW, _BLUE, _RED),
        scenes=("sky", "sky", "dusk"),
        tilt=0.12,
    ),
    ToyClass(
        wnid="n90000012",
        name="crescent moon, crescent",
        draw=_moon,
        palette=(_YELLOW, _CREAM, _SNOW, _GOLD),
        accents=(_YELLOW, _SNOW),
        scenes=("night", "night", "dusk"),
        tilt=0.5,
    ),
)


# --- Images -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pose:
    """Maps an object's frame to a picture, in fractions of its side."""

    centre: Float64[np.ndarray, "2"]
    matrix: Float64[np.ndarray, "2 2"]

    def place(self, outline: Outline) -> Outline:
        return outline @ self.matrix.T + self.centre


def _pose(rng: Generator, tilt: float) -> _Pose:
    """A random pose: the object takes some 55 to 85 % of the side, mostly inside the picture."""
    scale = rng.uniform(0.29, 0.42)
    angle = rng.uniform(-math.pi, math.pi) if math.isinf(tilt) else rng.normal(0.0, tilt)
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    stretch, shear = math.exp(rng.normal(0.0, 0.06)), rng.normal(0.0, 0.06)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    deformation = np.array([[mirror * stretch, shear], [0.0, 1.0 / stretch]])
    room = 0.5 - scale + 0.04
    return _Pose(0.5 + rng.uniform(-room, room, 2), scale * rotation @ deformation)


def _plane(image: Image.Image) -> Plane:
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _blend(picture: Picture, colour: Rgb, coverage: Plane) -> Picture:
    return picture + coverage[..., None] * (np.asarray(colour, dtype=np.float32) - picture)


def _vertices(outline: Outline, side: int) -> list[float]:
    """Where an outline given in fractions of the side lies, for `ImageDraw.polygon`."""
    return (outline * side).ravel().tolist()


def _coverage(outline: Outline, image_size: int) -> Image.Image:
    """How much of every pixel the outline (in fractions of the side) covers, as an L image."""
    side = image_size * SUPERSAMPLING
    large = Image.new("L", (side, side))
    ImageDraw.Draw(large).polygon(_vertices(outline, side), fill=255)
    return large.reduce(SUPERSAMPLING)


def _rasterise(parts: list[_Part], pose: _Pose, image_size: int) -> tuple[Picture, Image.Image]:
    """The parts before black, that is with colours premultiplied, and their joint coverage."""
    side = image_size * SUPERSAMPLING
    colours, whole = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    draw_colour, draw_whole = ImageDraw.Draw(colours), ImageDraw.Draw(whole)
    for part in parts:
        vertices = _vertices(pose.place(part.outline), side)
        red, green, blue = (round(255 * channel) for channel in part.colour)
        draw_colour.polygon(vertices, fill=(red, green, blue))
        draw_whole.polygon(vertices, fill=255)
    premultiplied = np.asarray(colours.reduce(SUPERSAMPLING), dtype=np.float32) / np.float32(255)
    return premultiplied, whole.reduce(SUPERSAMPLING)


def _grid(image_size: int) -> tuple[Plane, Plane]:
    """The x and y of every pixel's centre, from 0 to 1."""
    centres = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    x, y = np.meshgrid(centres, centres)
    return x, y


def _background(rng: Generator, scene: _Scene, image_size: int) -> Picture:
    _, y = _grid(image_size)
    if scene.has_horizon:
        horizon, softness = rng.uniform(0.45, 0.75), rng.uniform(0.015, 0.06)
        share = np.clip(0.5 + (y - horizon) / (2 * softness), 0, 1)
    else:
        share = np.clip(y * rng.uniform(0.8, 1.2) + rng.uniform(-0.15, 0.15), 0, 1)
    top, bottom = _varied(rng, scene.top), _varied(rng, scene.bottom)
    picture = np.full((image_size, image_size, 3), top, dtype=np.float32)
    return _blend(picture, bottom, share.astype(np.float32))


def _add_distractor(rng: Generator, picture: Picture, palette: Sequence[Hsv]) -> Picture:
    """A small round thing near the border, behind the object."""
    angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.06, 0.12)
    x, y = 0.5 + 0.42 * math.cos(angle), 0.5 + 0.42 * math.sin(angle)
    outline = _ellipse(x, y, radius, radius * rng.uniform(0.7, 1.3))
    colour = _varied(rng, _pick(rng, palette))
    return _blend(picture, colour, _plane(_coverage(outline, picture.shape[0])))


def _add_occluder(rng: Generator, picture: Picture) -> Picture:
    """A leaf or a stone in the foreground, centred on the border."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = 0.5 + 0.6 * math.cos(angle), 0.5 + 0.6 * math.sin(angle)
    outline = _ellipse(x, y, rng.uniform(0.15, 0.3), rng.uniform(0.12, 0.2), angle + math.pi / 2)
    colour = _varied(rng, _pick(rng, (_PINE, _GREEN, _SLATE, _BROWN)))
    soft = _coverage(outline, picture.shape[0]).filter(ImageFilter.GaussianBlur(0.6))
    return _blend(picture, colour, _plane(soft))


def _add_object(rng: Generator, picture: Picture, parts: list[_Part], pose: _Pose) -> Picture:
    """The object with rounded edges, lit from one side, and its soft shadow."""
    size = picture.shape[0]
    premultiplied, whole = _rasterise(parts, pose, size)
    light = rng.uniform(-math.pi, 0.0)
    toward = (math.cos(light), math.sin(light))

    shadow = Image.new("L", (size, size))
    shadow.paste(whole, (round(-0.06 * size * toward[0]), round(-0.06 * size * toward[1])))
    darkness = rng.uniform(0.1, 0.35) * _plane(shadow.filter(ImageFilter.GaussianBlur(0.05 * size)))

    x, y = _grid(size)
    slope = ((x - pose.centre[0]) * toward[0] + (y - pose.centre[1]) * toward[1]) / 0.35
    rim = 1 - _plane(whole.filter(ImageFilter.GaussianBlur(0.06 * size)))
    shade = (1 + rng.uniform(0.05, 0.25) * slope) * (1 - 0.35 * rim)
    behind = picture * ((1 - darkness) * (1 - _plane(whole)))[..., None]
    return (behind + premultiplied * shade[..., None]).astype(np.float32)


def _relight(rng: Generator, picture: Picture) -> Picture:
    """Vary exposure, contrast, the light's colour, and a slow fall-off over the picture."""
    x, y = _grid(picture.shape[0])
    across, down = rng.normal(0.0, 0.07, 2)
    fall_off = 1 + across * (2 * x - 1) + down * (2 * y - 1)
    gain = math.exp(rng.normal(0.0, 0.12)) * np.exp(rng.normal(0.0, 0.05, 3))
    contrasted = 0.5 + math.exp(rng.normal(0.0, 0.1)) * (picture - 0.5)
    return (contrasted * fall_off[..., None] * gain).astype(np.float32)


def render_image(
    class_index: int, rng: Generator, *, image_size: int
) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Draw one random image of a class.

    Args:
        class_index: Index into `CLASSES`.
        rng: The only source of chance.
        image_size: Side of the square image, in pixels.

    Returns:
        The image in RGB, from 0 to 255.
    """
    toy_class = CLASSES[class_index]
    other = CLASSES[int(rng.integers(len(CLASSES)))]
    dressed_as = toy_class if rng.random() < OWN_PALETTE_RATE else other
    main = _varied(rng, _pick(rng, dressed_as.palette))
    accent = _varied(rng, _pick(rng, dressed_as.accents))
    names = toy_class.scenes if rng.random() < OWN_SCENE_RATE else tuple(_SCENES)
    scene = _SCENES[names[int(rng.integers(len(names)))]]

    picture = _background(rng, scene, image_size)
    if rng.random() < DISTRACTOR_RATE:
        picture = _add_distractor(rng, picture, other.palette)
    parts = toy_class.draw(rng, main, accent)
    picture = _add_object(rng, picture, parts, _pose(rng, toy_class.tilt))
    if rng.random() < OCCLUDER_RATE:
        picture = _add_occluder(rng, picture)
    picture = _relight(rng, picture)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


# --- The tree -----------------------------------------------------------------------------------

_SPLIT_IDS = {"train": 0, "val": 1}


def _write_image(
    path: Path, *, split: str, class_index: int, index: int, image_size: int, seed: int
) -> None:
    # Every image has a stream of its own, so that its bytes do not depend on the others.
    rng = np.random.default_rng([seed, _SPLIT_IDS[split], class_index, index])
    image = Image.fromarray(render_image(class_index, rng, image_size=image_size))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="JPEG", quality=JPEG_QUALITY, optimize=True, subsampling=0)


def _check_replaceable(root: Path, mapping: str) -> None:
    """Refuse to replace a folder that this module did not write: real data would be lost."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    own = root / MAPPING_NAME
    if not own.is_file() or own.read_text(encoding="utf-8", errors="replace") != mapping:
        msg = (
            f"{root}: holds something other than the toy images, which would replace it; set "
            f"data.source to imagefolder to read it, or data.root to another folder"
        )
        raise ValueError(msg)


def render_tree(
    root: Path,
    *,
    num_train: int,
    num_val: int,
    image_size: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the drawn ImageNet, which replaces `root` when it is whole.

    It holds `train/<wnid>/<wnid>_<number>.JPEG`, `val/<wnid>/ILSVRC2012_val_<number>.JPEG` and
    `LOC_synset_mapping.txt`. In both splits the classes' sizes differ by one at most. An image's
    pixels depend on the seed, its split, its class and its number within that class only, so a
    larger split begins with the images of a smaller one.

    Args:
        root: The folder to write; an earlier one of the same kind is replaced.
        num_train: Number of training images.
        num_val: Number of validation images, drawn from streams of their own.
        image_size: Side of the square images, in pixels.
        seed: Seed of all chance, not negative.
        on_progress: Called after every image with the number written so far.

    Raises:
        ValueError: a split is too small for every class to have an image, or `root` holds
            something else.
    """
    for name, number in (("num_train", num_train), ("num_val", num_val)):
        if number < len(CLASSES):
            msg = (
                f"data.{name} is {number}, but each of the {len(CLASSES)} toy classes needs an "
                f"image: set it to {len(CLASSES)} or more"
            )
            raise ValueError(msg)
    mapping = "".join(f"{toy_class.wnid} {toy_class.name}\n" for toy_class in CLASSES)
    _check_replaceable(root, mapping)
    written = 0
    with replace_dir(root) as temporary:
        for split, number in (("train", num_train), ("val", num_val)):
            for position in range(number):
                index, class_index = divmod(position, len(CLASSES))
                wnid = CLASSES[class_index].wnid
                name = (
                    f"{wnid}_{index}.JPEG"
                    if split == "train"
                    else f"ILSVRC2012_val_{position + 1:08d}.JPEG"
                )
                _write_image(
                    temporary / split / wnid / name,
                    split=split,
                    class_index=class_index,
                    index=index,
                    image_size=image_size,
                    seed=seed,
                )
                written += 1
                if on_progress is not None:
                    on_progress(written)
        (temporary / MAPPING_NAME).write_text(mapping, encoding="utf-8")
