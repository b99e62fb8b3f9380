"""The twelve objects, drawn from parts with some chance in their proportions."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from contradiff.toy.colours import GLASS, INK, WHITE, WOOD, Rgb, mixed, scaled
from contradiff.toy.outlines import (
    Outline,
    box,
    ellipse,
    handle,
    lobed,
    mirrored,
    polygon,
    smooth,
)


@dataclass(frozen=True)
class Part:
    """One filled outline, in the object's own frame: x right and y down, both about -1 to 1."""

    outline: Outline
    colour: Rgb


def goldfish(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """A body with a forked tail, a fin, an eye and at times a band."""
    height = rng.uniform(0.38, 0.56)
    fork = rng.uniform(0.5, 0.7)
    fin = scaled(main, 0.78)
    tail = smooth(
        (-0.25, 0.0), (-0.95, -fork), (-1.05, -fork), (-0.78, 0.0), (-1.05, fork), (-0.95, fork)
    )
    dorsal = smooth((-0.35, -0.3), (-0.2, -height - 0.3), (0.15, -height - 0.2), (0.45, -0.25))
    parts = [
        Part(tail, fin),
        Part(dorsal, fin),
        Part(ellipse(0.2, 0.0, 0.78, height), main),
        Part(ellipse(0.2, 0.45 * height, 0.55, 0.42 * height), mixed(main, WHITE, 0.4)),
    ]
    if rng.random() < 0.4:
        parts.append(Part(ellipse(0.12, 0.0, 0.13, 0.88 * height), accent))
    return [
        *parts,
        Part(ellipse(0.62, -0.12, 0.15, 0.15), WHITE),
        Part(ellipse(0.64, -0.12, 0.09, 0.09), INK),
    ]


def butterfly(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """Two pairs of wings about a thin body."""
    upper_tilt, lower_size = rng.uniform(0.4, 0.8), rng.uniform(0.34, 0.46)
    upper = ellipse(0.52, -0.36, 0.56, rng.uniform(0.36, 0.46), -upper_tilt)
    lower = ellipse(0.4, 0.42, lower_size, lower_size + 0.06, -0.4)
    spots = [ellipse(0.6, -0.42, 0.24, 0.18, -upper_tilt), ellipse(0.44, 0.46, 0.17, 0.17)]
    hind, rim = scaled(main, 0.82), scaled(main, 0.45)
    parts: list[Part] = []
    for side in (upper, mirrored(upper)):
        parts += [Part(side, rim), Part(side * 0.88, main)]
    parts += [Part(lower, hind), Part(mirrored(lower), hind)]
    parts += [Part(side, accent) for spot in spots for side in (spot, mirrored(spot))]
    return [*parts, Part(ellipse(0.0, 0.0, 0.11, 0.66), INK)]


def mushroom(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """A cap, at times spotted, on a stem."""
    half, rise = rng.uniform(0.78, 0.98), rng.uniform(0.7, 1.0)
    stem_half = rng.uniform(0.2, 0.34)
    stem = smooth(
        (-stem_half, -0.2), (stem_half, -0.2), (stem_half * 1.5, 0.98), (-stem_half * 1.5, 0.98)
    )
    cap = smooth(
        (-half, 0.25),
        (-half, -0.3),
        (-0.5, -rise - 0.1),
        (0.5, -rise - 0.1),
        (half, -0.3),
        (half, 0.25),
    )
    parts = [
        Part(stem, mixed(accent, WHITE, 0.7)),
        Part(ellipse(0.0, 0.02, half * 0.72, 0.17), scaled(mixed(accent, WHITE, 0.5), 0.75)),
        Part(cap, main),
    ]
    if rng.random() < 0.65:
        spot = mixed(accent, WHITE, 0.8)
        radius = rng.uniform(0.11, 0.16)
        for x, y in ((-0.48, -0.2), (0.06, -0.52 * rise), (0.5, -0.16)):
            parts.append(Part(ellipse(x, y, radius * 1.15, radius), spot))
    return parts


def tree(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """A trunk under a round crown, or under three tiers."""
    trunk_half = rng.uniform(0.09, 0.16)
    trunk = polygon(
        (-trunk_half, 0.0), (trunk_half, 0.0), (trunk_half * 1.4, 1.0), (-trunk_half * 1.4, 1.0)
    )
    parts = [Part(trunk, accent)]
    if rng.random() < 0.35:
        for level, (y, half) in enumerate(((0.62, 0.78), (0.12, 0.62), (-0.36, 0.45))):
            tier = polygon((-half, y), (half, y), (0.0, y - 0.78))
            parts.append(Part(tier, scaled(main, 0.8 + 0.12 * level)))
        return parts
    half = rng.uniform(0.42, 0.54)
    parts += [
        Part(ellipse(-0.4, -0.12, half, 0.44), scaled(main, 0.85)),
        Part(ellipse(0.4, -0.1, half, 0.42), scaled(main, 0.78)),
        Part(ellipse(rng.uniform(-0.12, 0.12), -0.45, half + 0.08, 0.52), main),
    ]
    return parts


def house(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """Walls under a roof, with a door, a window and at times a chimney."""
    half, eaves = rng.uniform(0.68, 0.82), rng.uniform(-0.2, 0.02)
    ridge = rng.uniform(0.0, 0.35)
    roof = polygon((-half - 0.2, eaves), (-ridge, -0.92), (ridge, -0.92), (half + 0.2, eaves))
    parts: list[Part] = []
    if rng.random() < 0.5:
        parts.append(Part(box(0.36, -0.95, 0.58, -0.3), scaled(main, 0.6)))
    door = rng.uniform(-0.4, 0.0)
    return [
        *parts,
        Part(box(-half, eaves - 0.02, half, 0.9), main),
        Part(roof, accent),
        Part(box(door - 0.17, 0.3, door + 0.17, 0.9), scaled(accent, 0.6)),
        Part(box(0.2, 0.18, 0.54, 0.52), GLASS),
    ]


def sailboat(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """A hull, a mast and two sails."""
    mast, top = rng.uniform(-0.15, 0.1), rng.uniform(-1.0, -0.85)
    belly = rng.uniform(0.2, 0.5)
    sail = polygon((mast + 0.06, top), (mast + belly, -0.2), (0.82, 0.34), (mast + 0.06, 0.34))
    jib = polygon((mast - 0.08, top + 0.2), (mast - 0.08, 0.34), (-0.85, 0.34))
    hull = polygon((-0.95, 0.48), (0.98, 0.44), (0.66, 0.88), (-0.62, 0.9))
    jib_colour = main if rng.random() < 0.5 else mixed(main, WHITE, 0.6)
    return [
        Part(box(mast - 0.04, top, mast + 0.05, 0.6), scaled(WOOD, 0.8)),
        Part(sail, main),
        Part(jib, jib_colour),
        Part(hull, accent),
        Part(box(-0.86, 0.46, 0.9, 0.56), mixed(accent, WHITE, 0.45)),
    ]


def sunflower(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """Petals about a dark disc."""
    lobes = int(rng.integers(6, 11))
    petals = lobed(lobes, rng.uniform(0.55, 0.68), 0.6)
    core = rng.uniform(0.34, 0.48)
    turn = math.pi / lobes
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return [
        Part(petals @ rotation, scaled(main, 0.75)),
        Part(petals * 0.94, main),
        Part(ellipse(0.0, 0.0, core, core), accent),
        Part(ellipse(0.0, 0.0, core * 0.6, core * 0.6), scaled(accent, 0.65)),
    ]


def cup(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """A cup with a handle, on its saucer."""
    top, foot = rng.uniform(0.6, 0.75), rng.uniform(0.36, 0.62)
    brim = rng.uniform(-0.7, -0.5)
    body = polygon((-top, brim), (top, brim), (foot, 0.75), (-foot, 0.75))
    parts = [
        Part(ellipse(0.0, 0.78, 0.9, 0.16), scaled(mixed(main, WHITE, 0.3), 0.9)),
        Part(handle(top - 0.06, 0.0, outer=0.44, inner=0.25), scaled(main, 0.85)),
        Part(body, main),
    ]
    if rng.random() < 0.4:
        half = 0.5 * (top + foot) + 0.02
        parts.append(Part(box(-half, -0.1, half, 0.2), accent))
    return [
        *parts,
        Part(ellipse(0.0, 0.75, foot, 0.1), main),
        Part(ellipse(0.0, brim, top, 0.2), mixed(main, WHITE, 0.5)),
        Part(ellipse(0.0, brim + 0.02, top * 0.84, 0.14), (0.28, 0.17, 0.10)),
    ]


def starfish(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """Five arms, at times dotted."""
    arms = lobed(5, rng.uniform(0.28, 0.42), rng.uniform(0.9, 1.5))
    parts = [Part(arms, scaled(main, 0.85)), Part(arms * 0.78, mixed(main, accent, 0.25))]
    if rng.random() < 0.5:
        for arm in range(5):
            angle = 2 * math.pi * arm / 5
            x, y = 0.42 * math.sin(angle), -0.42 * math.cos(angle)
            parts.append(Part(ellipse(x, y, 0.09, 0.09), mixed(accent, WHITE, 0.3)))
    return parts


def car(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """Seen from the side: body, cabin, two wheels."""
    roof, rear = rng.uniform(-0.62, -0.45), rng.uniform(-0.75, -0.5)
    front = rng.uniform(0.3, 0.55)
    wheel = rng.uniform(0.22, 0.28)
    cabin = polygon((rear, -0.02), (rear + 0.2, roof), (front - 0.2, roof), (front + 0.1, -0.02))
    panes = polygon(
        (rear + 0.12, -0.04),
        (rear + 0.26, roof + 0.1),
        (front - 0.24, roof + 0.1),
        (front - 0.04, -0.04),
    )
    body = smooth(
        (-1.02, 0.05),
        (-0.9, -0.1),
        (0.0, -0.08),
        (0.8, -0.06),
        (1.05, 0.1),
        (1.05, 0.45),
        (-1.05, 0.45),
    )
    parts = [Part(cabin, scaled(main, 0.92)), Part(panes, GLASS), Part(body, main)]
    middle = 0.5 * (rear + front)
    parts.append(Part(box(middle - 0.04, roof + 0.05, middle + 0.04, 0.0), main))
    parts.append(Part(ellipse(0.94, 0.12, 0.09, 0.09), mixed(accent, WHITE, 0.6)))
    for x in (-0.56, 0.56):
        parts.append(Part(ellipse(x, 0.42, wheel, wheel), INK))
        parts.append(Part(ellipse(x, 0.42, wheel * 0.5, wheel * 0.5), (0.7, 0.7, 0.72)))
    return parts


def balloon(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """A hot-air balloon: an envelope, at times striped, and a basket."""
    half = rng.uniform(0.6, 0.74)
    envelope = smooth(
        (-half, -0.95),
        (half, -0.95),
        (half + 0.08, -0.2),
        (0.1, 0.62),
        (-0.1, 0.62),
        (-half - 0.08, -0.2),
    )
    gore = smooth(
        (-0.28, -0.92), (0.28, -0.92), (0.34, -0.2), (0.06, 0.58), (-0.06, 0.58), (-0.34, -0.2)
    )
    parts = [
        Part(polygon((-0.2, 0.3), (0.2, 0.3), (0.16, 0.8), (-0.16, 0.8)), scaled(accent, 0.5)),
        Part(envelope, main),
    ]
    if rng.random() < 0.6:
        parts.append(Part(gore, accent))
    return [*parts, Part(box(-0.19, 0.72, 0.19, 1.0), WOOD)]


def moon(rng: Generator, main: Rgb, accent: Rgb) -> list[Part]:
    """A crescent, at times with a star."""
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
    parts = [Part(crescent, main)]
    if rng.random() < 0.4:
        star = lobed(5, 0.35, 1.2) * 0.24 + np.array([0.6, rng.uniform(-0.3, 0.3)])
        parts.append(Part(star, mixed(accent, WHITE, 0.5)))
    return parts
