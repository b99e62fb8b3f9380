"""Outlines of the drawn objects: closed polygons, x to the right and y downwards."""

import math
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64

Outline: TypeAlias = Float64[np.ndarray, "_points 2"]


def polygon(*points: tuple[float, float]) -> Outline:
    """Connect the points by straight lines."""
    return np.array(points, dtype=np.float64)


def smooth(*points: tuple[float, float]) -> Outline:
    """Round a polygon: cut its corners three times (Chaikin), nearly a quadratic B-spline."""
    outline = polygon(*points)
    for _ in range(3):
        following = np.roll(outline, -1, axis=0)
        cut = np.stack([0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following], 1)
        outline = cut.reshape(-1, 2)
    return outline


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """Return a rectangle with sides along the axes."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Outline:
    """Return an ellipse by its centre, its radii, and its rotation in radians."""
    angle = np.linspace(0.0, 2 * math.pi, 32, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    cos, sin = math.cos(tilt), math.sin(tilt)
    return np.stack([x + u * cos - v * sin, y + u * sin + v * cos], axis=1)


def disc(x: float, y: float, radius: float) -> Outline:
    """Return a circle."""
    return ellipse(x, y, radius, radius)


def star(lobes: int, inner: float, sharpness: float) -> Outline:
    """Return a star: its radius swings between `inner` and 1; sharpness makes the lobes thin."""
    angle = np.linspace(0.0, 2 * math.pi, 16 * lobes, endpoint=False)
    wave = (0.5 + 0.5 * np.cos(lobes * angle)) ** sharpness
    radius = inner + (1.0 - inner) * wave
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def rotation(angle: float) -> Float64[np.ndarray, "2 2"]:
    """Return the matrix that rotates by an angle in radians."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def mirror(outline: Outline) -> Outline:
    """Exchange left and right."""
    return outline * np.array([-1.0, 1.0])
