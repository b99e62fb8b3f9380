"""Functions that draw the twelve objects with random proportions.

A drawing is a list of shapes, from back to front. Coordinates are from about -1 to 1. The x axis
points to the right, the y axis down. `main` and `accent` are the two colours of the object.
"""

import math
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64
from numpy.random import Generator

Outline: TypeAlias = Float64[np.ndarray, "_points 2"]  # a closed polygon
Rgb: TypeAlias = Float64[np.ndarray, "3"]  # red, green and blue, usually in [0, 1]
Shape: TypeAlias = tuple[Outline, Rgb]

WHITE = np.array((0.96, 0.95, 0.92))
INK = np.array((0.10, 0.09, 0.10))
WOOD = np.array((0.45, 0.30, 0.18))
GLASS = np.array((0.66, 0.82, 0.90))
STEEL = np.array((0.7, 0.7, 0.72))
TEA = np.array((0.28, 0.17, 0.10))


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """Mix two colours; `share` is the share of the second colour."""
    return first + share * (second - first)


def polygon(*points: tuple[float, float]) -> Outline:
    """Connect the points by straight lines."""
    return np.array(points, dtype=np.float64)


def smooth(*points: tuple[float, float]) -> Outline:
    """Round a polygon by cutting its corners three times (Chaikin's algorithm)."""
    outline = polygon(*points)
    for _ in range(3):
        following = np.roll(outline, -1, axis=0)
        cut = np.stack([0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following], 1)
        outline = cut.reshape(-1, 2)
    return outline


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """Return a rectangle whose sides are parallel to the axes."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Outline:
    """Return an ellipse with this centre, these radii and this rotation in radians."""
    angle = np.linspace(0.0, 2 * math.pi, 32, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    cos, sin = math.cos(tilt), math.sin(tilt)
    return np.stack([x + u * cos - v * sin, y + u * sin + v * cos], axis=1)


def disc(x: float, y: float, radius: float) -> Outline:
    """Return a circle with this centre and radius."""
    return ellipse(x, y, radius, radius)


def directions(angles: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, "n 2"]:
    """Return the points of the unit circle at these angles in radians."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def star(lobes: int, inner: float, sharpness: float) -> Outline:
    """Return a star whose radius varies from `inner` to 1. More sharpness makes thinner lobes."""
    angle = np.linspace(0.0, 2 * math.pi, 16 * lobes, endpoint=False)
    wave = (0.5 + 0.5 * np.cos(lobes * angle)) ** sharpness
    radius = inner + (1.0 - inner) * wave
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def rotation(angle: float) -> Float64[np.ndarray, "2 2"]:
    """Return the matrix that rotates by an angle in radians."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def sometimes(rng: Generator, chance: float, *shapes: Shape) -> list[Shape]:
    """Return all the shapes with probability `chance`, otherwise no shapes."""
    return list(shapes) if rng.random() < chance else []


def goldfish(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw a body with a forked tail, a fin, an eye and sometimes a band."""
    height, fork = rng.uniform(0.38, 0.56), rng.uniform(0.5, 0.7)
    tail = smooth(
        (-0.25, 0.0), (-0.95, -fork), (-1.05, -fork), (-0.78, 0.0), (-1.05, fork), (-0.95, fork)
    )
    dorsal = smooth((-0.35, -0.3), (-0.2, -height - 0.3), (0.15, -height - 0.2), (0.45, -0.25))
    return [
        (tail, main * 0.78),
        (dorsal, main * 0.78),
        (ellipse(0.2, 0.0, 0.78, height), main),
        (ellipse(0.2, 0.45 * height, 0.55, 0.42 * height), mix(main, WHITE, 0.4)),
        *sometimes(rng, 0.4, (ellipse(0.12, 0.0, 0.13, 0.88 * height), accent)),
        (disc(0.62, -0.12, 0.15), WHITE),
        (disc(0.64, -0.12, 0.09), INK),
    ]


def butterfly(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw two pairs of wings on the sides of a thin body."""
    tilt, lower_size = rng.uniform(0.4, 0.8), rng.uniform(0.34, 0.46)
    upper = ellipse(0.52, -0.36, 0.56, rng.uniform(0.36, 0.46), -tilt)
    lower = ellipse(0.4, 0.42, lower_size, lower_size + 0.06, -0.4)
    upper_spot, lower_spot = ellipse(0.6, -0.42, 0.24, 0.18, -tilt), disc(0.44, 0.46, 0.17)
    mirror = np.array([-1.0, 1.0])
    shapes: list[Shape] = []
    for wing in (upper, upper * mirror):
        shapes += [(wing, main * 0.45), (wing * 0.88, main)]
    for outline, colour in ((lower, main * 0.82), (upper_spot, accent), (lower_spot, accent)):
        shapes += [(outline, colour), (outline * mirror, colour)]
    return [*shapes, (ellipse(0.0, 0.0, 0.11, 0.66), INK)]


def mushroom(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw a cap, sometimes with spots, on a stem."""
    half, rise, foot = rng.uniform(0.78, 0.98), rng.uniform(0.7, 1.0), rng.uniform(0.2, 0.34)
    stem = smooth((-foot, -0.2), (foot, -0.2), (foot * 1.5, 0.98), (-foot * 1.5, 0.98))
    left, right = [(-half, 0.25), (-half, -0.3)], [(half, -0.3), (half, 0.25)]
    cap = smooth(*left, (-0.5, -rise - 0.1), (0.5, -rise - 0.1), *right)
    shapes = [
        (stem, mix(accent, WHITE, 0.7)),
        (ellipse(0.0, 0.02, half * 0.72, 0.17), 0.75 * mix(accent, WHITE, 0.5)),
        (cap, main),
    ]
    if rng.random() < 0.65:
        radius = rng.uniform(0.11, 0.16)
        for x, y in ((-0.48, -0.2), (0.06, -0.52 * rise), (0.5, -0.16)):
            shapes.append((ellipse(x, y, radius * 1.15, radius), mix(accent, WHITE, 0.8)))
    return shapes


def tree(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw a trunk under three triangles or under a round crown."""
    foot = rng.uniform(0.09, 0.16)
    trunk = polygon((-foot, 0.0), (foot, 0.0), (foot * 1.4, 1.0), (-foot * 1.4, 1.0))
    if rng.random() < 0.35:
        tiers = ((0.62, 0.78, 0.8), (0.12, 0.62, 0.92), (-0.36, 0.45, 1.04))
        crown = [
            (polygon((-half, y), (half, y), (0.0, y - 0.78)), main * light)
            for y, half, light in tiers
        ]
    else:
        half = rng.uniform(0.42, 0.54)
        crown = [
            (ellipse(-0.4, -0.12, half, 0.44), main * 0.85),
            (ellipse(0.4, -0.1, half, 0.42), main * 0.78),
            (ellipse(rng.uniform(-0.12, 0.12), -0.45, half + 0.08, 0.52), main),
        ]
    return [(trunk, accent), *crown]


def house(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw walls under a roof, with a door, a window and sometimes a chimney."""
    half, eaves, ridge = rng.uniform(0.68, 0.82), rng.uniform(-0.2, 0.02), rng.uniform(0.0, 0.35)
    roof = polygon((-half - 0.2, eaves), (-ridge, -0.92), (ridge, -0.92), (half + 0.2, eaves))
    chimney = sometimes(rng, 0.5, (box(0.36, -0.95, 0.58, -0.3), main * 0.6))
    door = rng.uniform(-0.4, 0.0)
    return [
        *chimney,
        (box(-half, eaves - 0.02, half, 0.9), main),
        (roof, accent),
        (box(door - 0.17, 0.3, door + 0.17, 0.9), accent * 0.6),
        (box(0.2, 0.18, 0.54, 0.52), GLASS),
    ]


def sailboat(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw a hull, a mast and two sails."""
    mast, top, belly = rng.uniform(-0.15, 0.1), rng.uniform(-1.0, -0.85), rng.uniform(0.2, 0.5)
    sail = polygon((mast + 0.06, top), (mast + belly, -0.2), (0.82, 0.34), (mast + 0.06, 0.34))
    jib = polygon((mast - 0.08, top + 0.2), (mast - 0.08, 0.34), (-0.85, 0.34))
    hull = polygon((-0.95, 0.48), (0.98, 0.44), (0.66, 0.88), (-0.62, 0.9))
    return [
        (box(mast - 0.04, top, mast + 0.05, 0.6), WOOD * 0.8),
        (sail, main),
        (jib, main if rng.random() < 0.5 else mix(main, WHITE, 0.6)),
        (hull, accent),
        (box(-0.86, 0.46, 0.9, 0.56), mix(accent, WHITE, 0.45)),
    ]


def sunflower(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw two rings of petals around a disc."""
    num_petals = int(rng.integers(6, 11))
    petals = star(num_petals, rng.uniform(0.55, 0.68), 0.6)
    core = rng.uniform(0.34, 0.48)
    return [
        (petals @ rotation(math.pi / num_petals), main * 0.75),
        (petals * 0.94, main),
        (disc(0.0, 0.0, core), accent),
        (disc(0.0, 0.0, core * 0.6), accent * 0.65),
    ]


def cup(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw a cup with a handle, sometimes with a stripe, on a saucer."""
    top, foot, brim = rng.uniform(0.6, 0.75), rng.uniform(0.36, 0.62), rng.uniform(-0.7, -0.5)
    middle = 0.5 * (top + foot) + 0.02
    arc = directions(np.linspace(-1.9, 1.9, 20))
    handle = np.concatenate([0.44 * arc, 0.25 * arc[::-1]]) + np.array([top - 0.06, 0.0])
    return [
        (ellipse(0.0, 0.78, 0.9, 0.16), 0.9 * mix(main, WHITE, 0.3)),
        (handle, main * 0.85),
        (polygon((-top, brim), (top, brim), (foot, 0.75), (-foot, 0.75)), main),
        *sometimes(rng, 0.4, (box(-middle, -0.1, middle, 0.2), accent)),
        (ellipse(0.0, 0.75, foot, 0.1), main),
        (ellipse(0.0, brim, top, 0.2), mix(main, WHITE, 0.5)),
        (ellipse(0.0, brim + 0.02, top * 0.84, 0.14), TEA),
    ]


def starfish(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw five arms, sometimes with dots."""
    arms = star(5, rng.uniform(0.28, 0.42), rng.uniform(0.9, 1.5))
    angles = [2 * math.pi * arm / 5 for arm in range(5)]
    dots = [disc(0.42 * math.sin(angle), -0.42 * math.cos(angle), 0.09) for angle in angles]
    return [
        (arms, main * 0.85),
        (arms * 0.78, mix(main, accent, 0.25)),
        *sometimes(rng, 0.5, *((dot, mix(accent, WHITE, 0.3)) for dot in dots)),
    ]


def car(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw a car from the side: a cabin, a body and two wheels."""
    roof, rear = rng.uniform(-0.62, -0.45), rng.uniform(-0.75, -0.5)
    front, radius = rng.uniform(0.3, 0.55), rng.uniform(0.22, 0.28)
    cabin = polygon((rear, -0.02), (rear + 0.2, roof), (front - 0.2, roof), (front + 0.1, -0.02))
    pane_left, pane_right = (rear + 0.26, roof + 0.1), (front - 0.24, roof + 0.1)
    panes = polygon((rear + 0.12, -0.04), pane_left, pane_right, (front - 0.04, -0.04))
    bonnet = [(-1.02, 0.05), (-0.9, -0.1), (0.0, -0.08), (0.8, -0.06), (1.05, 0.1)]
    pillar = 0.5 * (rear + front)
    wheels = [
        (disc(x, 0.42, size), colour)
        for x in (-0.56, 0.56)
        for size, colour in ((radius, INK), (radius * 0.5, STEEL))
    ]
    return [
        (cabin, main * 0.92),
        (panes, GLASS),
        (smooth(*bonnet, (1.05, 0.45), (-1.05, 0.45)), main),
        (box(pillar - 0.04, roof + 0.05, pillar + 0.04, 0.0), main),
        (disc(0.94, 0.12, 0.09), mix(accent, WHITE, 0.6)),
        *wheels,
    ]


def balloon(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw a hot-air balloon: an envelope, sometimes with a stripe, and a basket."""
    half = rng.uniform(0.6, 0.74)
    crown, wide = [(-half, -0.95), (half, -0.95)], half + 0.08
    envelope = smooth(*crown, (wide, -0.2), (0.1, 0.62), (-0.1, 0.62), (-wide, -0.2))
    stripe = smooth(
        (-0.28, -0.92), (0.28, -0.92), (0.34, -0.2), (0.06, 0.58), (-0.06, 0.58), (-0.34, -0.2)
    )
    return [
        (polygon((-0.2, 0.3), (0.2, 0.3), (0.16, 0.8), (-0.16, 0.8)), accent * 0.5),
        (envelope, main),
        *sometimes(rng, 0.6, (stripe, accent)),
        (box(-0.19, 0.72, 0.19, 1.0), WOOD),
    ]


def moon(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Draw a crescent, sometimes with a star."""
    horn, shift = rng.uniform(0.75, 1.25), rng.uniform(0.42, 0.68)
    outer = directions(np.linspace(horn, 2 * math.pi - horn, 32))
    # The inner arc is part of a circle further right. The two arcs meet at the horns.
    centre = math.cos(horn) + shift - 0.35
    reach = math.atan2(math.sin(horn), math.cos(horn) - centre)
    radius = math.hypot(math.sin(horn), math.cos(horn) - centre)
    inner = radius * directions(np.linspace(2 * math.pi - reach, reach, 32)) + [centre, 0.0]
    shapes = [(np.concatenate([outer, inner]) + np.array([0.2, 0.0]), main)]
    if rng.random() < 0.4:
        small_star = star(5, 0.35, 1.2) * 0.24 + [0.6, rng.uniform(-0.3, 0.3)]
        shapes.append((small_star, mix(accent, WHITE, 0.5)))
    return shapes


DRAWINGS = (
    goldfish,
    butterfly,
    mushroom,
    tree,
    house,
    sailboat,
    sunflower,
    cup,
    starfish,
    car,
    balloon,
    moon,
)
"""The functions in the order of the class indices."""
