"""Outlines of drawn objects: polygons in the object's own frame."""

import math
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64

Outline: TypeAlias = Float64[np.ndarray, "_points 2"]


def polygon(*points: tuple[float, float]) -> Outline:
    """The points as they are."""
    return np.array(points, dtype=np.float64)


def mirrored(outline: Outline) -> Outline:
    """Left and right exchanged."""
    return outline * np.array([-1.0, 1.0])


def smooth(*points: tuple[float, float]) -> Outline:
    """A closed polygon with its corners cut thrice (Chaikin), nearly a quadratic B-spline."""
    outline = polygon(*points)
    for _ in range(3):
        following = np.roll(outline, -1, axis=0)
        cut = np.stack([0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following], 1)
        outline = cut.reshape(-1, 2)
    return outline


def ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Outline:
    """Centre, radii, and a tilt in radians; 32 points."""
    angle = np.linspace(0.0, 2 * math.pi, 32, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    cos, sin = math.cos(tilt), math.sin(tilt)
    return np.stack([x + u * cos - v * sin, y + u * sin + v * cos], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """A rectangle with its sides along the axes."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def handle(x: float, y: float, *, outer: float, inner: float) -> Outline:
    """A thick arc, open to the left."""
    angle = np.linspace(-1.9, 1.9, 20)
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.array([x, y]) + np.concatenate([outer * ray, inner * ray[::-1]])


def lobed(lobes: int, inner: float, sharpness: float) -> Outline:
    """A star-like outline, its radius between `inner` and 1; greater sharpness, thinner lobes."""
    angle = np.linspace(0.0, 2 * math.pi, 16 * lobes, endpoint=False)
    wave = (0.5 + 0.5 * np.cos(lobes * angle)) ** sharpness
    radius = inner + (1.0 - inner) * wave
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
