"""Rendering of one random image of a class."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from contradiff.toy.classes import CLASSES, SCENES, Scene, pick, vary
from contradiff.toy.objects import Outline, Rgb, Shape, ellipse, rotation

Picture: TypeAlias = Float32[np.ndarray, "height width 3"]

OBJECT_SCALES = (0.29, 0.42)
"""Least and greatest scale: an object takes 55 to 85 % of the picture's side."""


def render_image(
    class_index: int, rng: Generator, *, image_size: int
) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Render one random image of the class CLASSES[class_index]: RGB, 0 to 255.

    With probability 0.7, the colours are typical of the class, otherwise they are typical of a
    random class. The background is typical with probability 0.65, otherwise random.
    """
    toy_class = CLASSES[class_index]
    other = CLASSES[int(rng.integers(len(CLASSES)))]
    model = toy_class if rng.random() < 0.7 else other
    main, accent = pick(rng, model.palette), pick(rng, model.accents)
    scenes = toy_class.scenes if rng.random() < 0.65 else tuple(SCENES)
    scene = SCENES[scenes[int(rng.integers(len(scenes)))]]

    picture = draw_background(rng, scene, image_size=image_size)
    if rng.random() < 0.2:  # a distractor: a small ellipse behind the object, near the border
        angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.06, 0.12)
        centre = 0.5 + 0.42 * math.cos(angle), 0.5 + 0.42 * math.sin(angle)
        distractor = ellipse(*centre, radius, radius * rng.uniform(0.7, 1.3))
        colour = pick(rng, other.palette)
        picture = _blend(picture, colour, _plane(_fill([distractor], image_size)))
    picture = add_object(rng, picture, toy_class.draw(rng, main, accent), toy_class.tilt)
    if rng.random() < 0.15:  # an occluder: a larger ellipse in the foreground, near the border
        angle = rng.uniform(0, 2 * math.pi)
        centre = 0.5 + 0.6 * math.cos(angle), 0.5 + 0.6 * math.sin(angle)
        radii = rng.uniform(0.15, 0.3), rng.uniform(0.12, 0.2)
        colour = pick(rng, ("pine", "green", "slate", "brown"))
        mask = _fill([ellipse(*centre, *radii, angle + math.pi / 2)], image_size)
        picture = _blend(picture, colour, _plane(mask.filter(ImageFilter.GaussianBlur(0.6))))

    return light(rng, picture)


def draw_background(rng: Generator, scene: Scene, *, image_size: int) -> Picture:
    """Draw a background from the scene's two colours, after varying each colour a little."""
    y, _ = _pixel_centres(image_size)
    if scene.has_horizon:
        horizon, softness = rng.uniform(0.45, 0.75), rng.uniform(0.015, 0.06)
        share = np.clip(0.5 + (y - horizon) / (2 * softness), 0, 1)
    else:
        share = np.clip(y * rng.uniform(0.8, 1.2) + rng.uniform(-0.15, 0.15), 0, 1)
    top, bottom = vary(rng, scene.top), vary(rng, scene.bottom)
    picture = np.full((image_size, image_size, 3), top, dtype=np.float32)
    return _blend(picture, bottom, share.astype(np.float32))


def light(rng: Generator, picture: Picture) -> UInt8[np.ndarray, "height width 3"]:
    """Vary exposure, contrast and the colour of the light. Darken one side a little."""
    y, x = _pixel_centres(len(picture))
    across, down = rng.normal(0.0, 0.07, 2)
    fall_off = 1 + across * (2 * x - 1) + down * (2 * y - 1)
    gain = math.exp(rng.normal(0.0, 0.12)) * np.exp(rng.normal(0.0, 0.05, 3))
    contrasted = 0.5 + math.exp(rng.normal(0.0, 0.1)) * (picture - 0.5)
    lit = (contrasted * fall_off[..., None] * gain).astype(np.float32)
    return np.rint(np.clip(lit, 0, 1) * 255).astype(np.uint8)


def add_object(
    rng: Generator,
    picture: Picture,
    shapes: list[Shape],
    tilt: float,
    *,
    scales: tuple[float, float] = OBJECT_SCALES,
) -> Picture:
    """Add an object with shaded edges, light from one side, and a soft shadow."""
    size = picture.shape[0]
    scale = rng.uniform(*scales)
    angle = rng.uniform(-math.pi, math.pi) if math.isinf(tilt) else rng.normal(0.0, tilt)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    stretch, shear = math.exp(rng.normal(0.0, 0.06)), rng.normal(0.0, 0.06)
    matrix = scale * rotation(angle) @ np.array([[flip * stretch, shear], [0.0, 1.0 / stretch]])
    room = 0.5 - scale + 0.04
    centre = 0.5 + rng.uniform(-room, room, 2)
    outlines = [outline @ matrix.T + centre for outline, _ in shapes]
    object_colours = _plane(_fill(outlines, size, colours=[colour for _, colour in shapes]))
    mask = _fill(outlines, size)
    light = rng.uniform(-math.pi, 0.0)
    toward = (math.cos(light), math.sin(light))

    shadow = Image.new("L", (size, size))
    shadow.paste(mask, (round(-0.06 * size * toward[0]), round(-0.06 * size * toward[1])))
    darkness = rng.uniform(0.1, 0.35) * _plane(shadow.filter(ImageFilter.GaussianBlur(0.05 * size)))

    y, x = _pixel_centres(size)
    slope = ((x - centre[0]) * toward[0] + (y - centre[1]) * toward[1]) / 0.35
    rim = 1 - _plane(mask.filter(ImageFilter.GaussianBlur(0.06 * size)))
    shade = (1 + rng.uniform(0.05, 0.25) * slope) * (1 - 0.35 * rim)
    behind = picture * ((1 - darkness) * (1 - _plane(mask)))[..., None]
    return (behind + object_colours * shade[..., None]).astype(np.float32)


def _fill(
    outlines: Sequence[Outline], image_size: int, *, colours: Sequence[Rgb] | None = None
) -> Image.Image:
    """Fill outlines (in fractions of the side) with their colours. Without colours, make a mask."""
    oversampling = 4  # smooths the edges
    side = image_size * oversampling
    large = Image.new("RGB" if colours else "L", (side, side))
    pen = ImageDraw.Draw(large)
    for index, outline in enumerate(outlines):
        fill = tuple(round(255 * channel) for channel in colours[index]) if colours else 255
        pen.polygon((outline * side).ravel().tolist(), fill=fill)
    return large.reduce(oversampling)


def _plane(image: Image.Image) -> Float32[np.ndarray, "height width *rgb"]:
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _blend(picture: Picture, colour: Rgb, share: Float32[np.ndarray, "height width"]) -> Picture:
    return picture + share[..., None] * (colour.astype(np.float32) - picture)


def _pixel_centres(image_size: int) -> Float32[np.ndarray, "2 height width"]:
    """Return y and x of every pixel's centre, in fractions of the side."""
    return (np.mgrid[:image_size, :image_size].astype(np.float32) + 0.5) / image_size
