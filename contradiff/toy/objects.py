"""The twelve objects, each drawn with random proportions.

A drawing is a list of shapes from back to front. Coordinates run from about -1 to 1, x to the right
and y downwards. `main` and `accent` are the two colours of the object.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.random import Generator

from contradiff.toy.colours import GLASS, INK, WHITE, WOOD, Rgb, mix, scale
from contradiff.toy.outlines import (
    Outline,
    box,
    disc,
    ellipse,
    mirror,
    polygon,
    rotation,
    smooth,
    star,
)

Shape: TypeAlias = tuple[Outline, Rgb]
"""An outline and the colour that fills it."""


def sometimes(rng: Generator, chance: float, *shapes: Shape) -> list[Shape]:
    """Return all the shapes with this probability, otherwise none."""
    return list(shapes) if rng.random() < chance else []


def goldfish(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """A body with a forked tail, a fin, an eye and sometimes a band."""
    height, fork = rng.uniform(0.38, 0.56), rng.uniform(0.5, 0.7)
    tail = smooth(
        (-0.25, 0.0), (-0.95, -fork), (-1.05, -fork), (-0.78, 0.0), (-1.05, fork), (-0.95, fork)
    )
    dorsal = smooth((-0.35, -0.3), (-0.2, -height - 0.3), (0.15, -height - 0.2), (0.45, -0.25))
    return [
        (tail, scale(main, 0.78)),
        (dorsal, scale(main, 0.78)),
        (ellipse(0.2, 0.0, 0.78, height), main),
        (ellipse(0.2, 0.45 * height, 0.55, 0.42 * height), mix(main, WHITE, 0.4)),
        *sometimes(rng, 0.4, (ellipse(0.12, 0.0, 0.13, 0.88 * height), accent)),
        (disc(0.62, -0.12, 0.15), WHITE),
        (disc(0.64, -0.12, 0.09), INK),
    ]


def butterfly(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Two pairs of wings about a thin body."""
    tilt, lower_size = rng.uniform(0.4, 0.8), rng.uniform(0.34, 0.46)
    upper = ellipse(0.52, -0.36, 0.56, rng.uniform(0.36, 0.46), -tilt)
    lower = ellipse(0.4, 0.42, lower_size, lower_size + 0.06, -0.4)
    upper_spot, lower_spot = ellipse(0.6, -0.42, 0.24, 0.18, -tilt), disc(0.44, 0.46, 0.17)
    shapes: list[Shape] = []
    for wing in (upper, mirror(upper)):
        shapes += [(wing, scale(main, 0.45)), (wing * 0.88, main)]
    for outline, colour in ((lower, scale(main, 0.82)), (upper_spot, accent), (lower_spot, accent)):
        shapes += [(outline, colour), (mirror(outline), colour)]
    return [*shapes, (ellipse(0.0, 0.0, 0.11, 0.66), INK)]


def mushroom(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """A cap, sometimes spotted, on a stem."""
    half, rise, foot = rng.uniform(0.78, 0.98), rng.uniform(0.7, 1.0), rng.uniform(0.2, 0.34)
    stem = smooth((-foot, -0.2), (foot, -0.2), (foot * 1.5, 0.98), (-foot * 1.5, 0.98))
    left, right = [(-half, 0.25), (-half, -0.3)], [(half, -0.3), (half, 0.25)]
    cap = smooth(*left, (-0.5, -rise - 0.1), (0.5, -rise - 0.1), *right)
    shapes = [
        (stem, mix(accent, WHITE, 0.7)),
        (ellipse(0.0, 0.02, half * 0.72, 0.17), scale(mix(accent, WHITE, 0.5), 0.75)),
        (cap, main),
    ]
    if rng.random() < 0.65:
        radius = rng.uniform(0.11, 0.16)
        for x, y in ((-0.48, -0.2), (0.06, -0.52 * rise), (0.5, -0.16)):
            shapes.append((ellipse(x, y, radius * 1.15, radius), mix(accent, WHITE, 0.8)))
    return shapes


def tree(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """A trunk under three tiers or under a round crown."""
    foot = rng.uniform(0.09, 0.16)
    trunk = polygon((-foot, 0.0), (foot, 0.0), (foot * 1.4, 1.0), (-foot * 1.4, 1.0))
    if rng.random() < 0.35:
        tiers = ((0.62, 0.78, 0.8), (0.12, 0.62, 0.92), (-0.36, 0.45, 1.04))
        crown = [
            (polygon((-half, y), (half, y), (0.0, y - 0.78)), scale(main, light))
            for y, half, light in tiers
        ]
    else:
        half = rng.uniform(0.42, 0.54)
        crown = [
            (ellipse(-0.4, -0.12, half, 0.44), scale(main, 0.85)),
            (ellipse(0.4, -0.1, half, 0.42), scale(main, 0.78)),
            (ellipse(rng.uniform(-0.12, 0.12), -0.45, half + 0.08, 0.52), main),
        ]
    return [(trunk, accent), *crown]


def house(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Walls under a roof, with a door, a window and sometimes a chimney."""
    half, eaves, ridge = rng.uniform(0.68, 0.82), rng.uniform(-0.2, 0.02), rng.uniform(0.0, 0.35)
    roof = polygon((-half - 0.2, eaves), (-ridge, -0.92), (ridge, -0.92), (half + 0.2, eaves))
    chimney = sometimes(rng, 0.5, (box(0.36, -0.95, 0.58, -0.3), scale(main, 0.6)))
    door = rng.uniform(-0.4, 0.0)
    return [
        *chimney,
        (box(-half, eaves - 0.02, half, 0.9), main),
        (roof, accent),
        (box(door - 0.17, 0.3, door + 0.17, 0.9), scale(accent, 0.6)),
        (box(0.2, 0.18, 0.54, 0.52), GLASS),
    ]


def sailboat(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """A hull, a mast and two sails."""
    mast, top, belly = rng.uniform(-0.15, 0.1), rng.uniform(-1.0, -0.85), rng.uniform(0.2, 0.5)
    sail = polygon((mast + 0.06, top), (mast + belly, -0.2), (0.82, 0.34), (mast + 0.06, 0.34))
    jib = polygon((mast - 0.08, top + 0.2), (mast - 0.08, 0.34), (-0.85, 0.34))
    hull = polygon((-0.95, 0.48), (0.98, 0.44), (0.66, 0.88), (-0.62, 0.9))
    return [
        (box(mast - 0.04, top, mast + 0.05, 0.6), scale(WOOD, 0.8)),
        (sail, main),
        (jib, main if rng.random() < 0.5 else mix(main, WHITE, 0.6)),
        (hull, accent),
        (box(-0.86, 0.46, 0.9, 0.56), mix(accent, WHITE, 0.45)),
    ]


def sunflower(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Two rows of petals about a dark disc."""
    num_petals = int(rng.integers(6, 11))
    petals = star(num_petals, rng.uniform(0.55, 0.68), 0.6)
    core = rng.uniform(0.34, 0.48)
    return [
        (petals @ rotation(math.pi / num_petals), scale(main, 0.75)),
        (petals * 0.94, main),
        (disc(0.0, 0.0, core), accent),
        (disc(0.0, 0.0, core * 0.6), scale(accent, 0.65)),
    ]


def cup(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """A cup with a handle, sometimes with a stripe, on its saucer."""
    top, foot, brim = rng.uniform(0.6, 0.75), rng.uniform(0.36, 0.62), rng.uniform(-0.7, -0.5)
    middle = 0.5 * (top + foot) + 0.02
    angle = np.linspace(-1.9, 1.9, 20)
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    handle = np.array([top - 0.06, 0.0]) + np.concatenate([0.44 * arc, 0.25 * arc[::-1]])
    return [
        (ellipse(0.0, 0.78, 0.9, 0.16), scale(mix(main, WHITE, 0.3), 0.9)),
        (handle, scale(main, 0.85)),
        (polygon((-top, brim), (top, brim), (foot, 0.75), (-foot, 0.75)), main),
        *sometimes(rng, 0.4, (box(-middle, -0.1, middle, 0.2), accent)),
        (ellipse(0.0, 0.75, foot, 0.1), main),
        (ellipse(0.0, brim, top, 0.2), mix(main, WHITE, 0.5)),
        (ellipse(0.0, brim + 0.02, top * 0.84, 0.14), (0.28, 0.17, 0.10)),
    ]


def starfish(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """Five arms, sometimes dotted."""
    arms = star(5, rng.uniform(0.28, 0.42), rng.uniform(0.9, 1.5))
    angles = [2 * math.pi * arm / 5 for arm in range(5)]
    dots = [disc(0.42 * math.sin(angle), -0.42 * math.cos(angle), 0.09) for angle in angles]
    return [
        (arms, scale(main, 0.85)),
        (arms * 0.78, mix(main, accent, 0.25)),
        *sometimes(rng, 0.5, *((dot, mix(accent, WHITE, 0.3)) for dot in dots)),
    ]


def car(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """A car from the side: cabin, body, two wheels."""
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
        for size, colour in ((radius, INK), (radius * 0.5, (0.7, 0.7, 0.72)))
    ]
    return [
        (cabin, scale(main, 0.92)),
        (panes, GLASS),
        (smooth(*bonnet, (1.05, 0.45), (-1.05, 0.45)), main),
        (box(pillar - 0.04, roof + 0.05, pillar + 0.04, 0.0), main),
        (disc(0.94, 0.12, 0.09), mix(accent, WHITE, 0.6)),
        *wheels,
    ]


def balloon(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """A hot-air balloon: an envelope, sometimes with a stripe, and a basket."""
    half = rng.uniform(0.6, 0.74)
    crown, wide = [(-half, -0.95), (half, -0.95)], half + 0.08
    envelope = smooth(*crown, (wide, -0.2), (0.1, 0.62), (-0.1, 0.62), (-wide, -0.2))
    stripe = smooth(
        (-0.28, -0.92), (0.28, -0.92), (0.34, -0.2), (0.06, 0.58), (-0.06, 0.58), (-0.34, -0.2)
    )
    return [
        (polygon((-0.2, 0.3), (0.2, 0.3), (0.16, 0.8), (-0.16, 0.8)), scale(accent, 0.5)),
        (envelope, main),
        *sometimes(rng, 0.6, (stripe, accent)),
        (box(-0.19, 0.72, 0.19, 1.0), WOOD),
    ]


def moon(rng: Generator, main: Rgb, accent: Rgb) -> list[Shape]:
    """A crescent, sometimes with a star."""
    horn, shift = rng.uniform(0.75, 1.25), rng.uniform(0.42, 0.68)
    outer_angle = np.linspace(horn, 2 * math.pi - horn, 32)
    outer = np.stack([np.cos(outer_angle), np.sin(outer_angle)], axis=1)
    # The inner arc belongs to a circle further right; the two arcs meet at the horns.
    centre = math.cos(horn) + shift - 0.35
    reach = math.atan2(math.sin(horn), math.cos(horn) - centre)
    radius = math.hypot(math.sin(horn), math.cos(horn) - centre)
    inner_angle = np.linspace(2 * math.pi - reach, reach, 32)
    inner = np.stack([centre + radius * np.cos(inner_angle), radius * np.sin(inner_angle)], axis=1)
    shapes = [(np.concatenate([outer, inner]) + np.array([0.2, 0.0]), main)]
    if rng.random() < 0.4:
        small_star = star(5, 0.35, 1.2) * 0.24 + np.array([0.6, rng.uniform(-0.3, 0.3)])
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
"""In the order of the class indices."""
