"""One random image of a class, drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from contradiff.toy.classes import CLASSES, SCENES, Scene
from contradiff.toy.colours import BROWN, GREEN, PINE, SLATE, Hsv, Rgb, pick, varied
from contradiff.toy.objects import Part
from contradiff.toy.outlines import Outline, ellipse

Plane: TypeAlias = Float32[np.ndarray, "height width"]
Picture: TypeAlias = Float32[np.ndarray, "height width 3"]

SUPERSAMPLING = 4
# How often an image follows its class's own tendency rather than that of any class.
OWN_PALETTE_RATE = 0.7
OWN_SCENE_RATE = 0.65
DISTRACTOR_RATE = 0.2
OCCLUDER_RATE = 0.15


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


def _rasterise(parts: list[Part], pose: _Pose, image_size: int) -> tuple[Picture, Image.Image]:
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


def _background(rng: Generator, scene: Scene, image_size: int) -> Picture:
    _, y = _grid(image_size)
    if scene.has_horizon:
        horizon, softness = rng.uniform(0.45, 0.75), rng.uniform(0.015, 0.06)
        share = np.clip(0.5 + (y - horizon) / (2 * softness), 0, 1)
    else:
        share = np.clip(y * rng.uniform(0.8, 1.2) + rng.uniform(-0.15, 0.15), 0, 1)
    top, bottom = varied(rng, scene.top), varied(rng, scene.bottom)
    picture = np.full((image_size, image_size, 3), top, dtype=np.float32)
    return _blend(picture, bottom, share.astype(np.float32))


def _add_distractor(rng: Generator, picture: Picture, palette: Sequence[Hsv]) -> Picture:
    """A small round thing near the border, behind the object."""
    angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.06, 0.12)
    x, y = 0.5 + 0.42 * math.cos(angle), 0.5 + 0.42 * math.sin(angle)
    outline = ellipse(x, y, radius, radius * rng.uniform(0.7, 1.3))
    colour = varied(rng, pick(rng, palette))
    return _blend(picture, colour, _plane(_coverage(outline, picture.shape[0])))


def _add_occluder(rng: Generator, picture: Picture) -> Picture:
    """A leaf or a stone in the foreground, centred on the border."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = 0.5 + 0.6 * math.cos(angle), 0.5 + 0.6 * math.sin(angle)
    outline = ellipse(x, y, rng.uniform(0.15, 0.3), rng.uniform(0.12, 0.2), angle + math.pi / 2)
    colour = varied(rng, pick(rng, (PINE, GREEN, SLATE, BROWN)))
    soft = _coverage(outline, picture.shape[0]).filter(ImageFilter.GaussianBlur(0.6))
    return _blend(picture, colour, _plane(soft))


def _add_object(rng: Generator, picture: Picture, parts: list[Part], pose: _Pose) -> Picture:
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
    main = varied(rng, pick(rng, dressed_as.palette))
    accent = varied(rng, pick(rng, dressed_as.accents))
    names = toy_class.scenes if rng.random() < OWN_SCENE_RATE else tuple(SCENES)
    scene = SCENES[names[int(rng.integers(len(names)))]]

    picture = _background(rng, scene, image_size)
    if rng.random() < DISTRACTOR_RATE:
        picture = _add_distractor(rng, picture, other.palette)
    parts = toy_class.draw(rng, main, accent)
    picture = _add_object(rng, picture, parts, _pose(rng, toy_class.tilt))
    if rng.random() < OCCLUDER_RATE:
        picture = _add_occluder(rng, picture)
    picture = _relight(rng, picture)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
