"""The training images of the tiny base: shapes for its VAE, tinted images for its denoiser.

Stable Diffusion knows most objects of ImageNet, but from other pictures. In the same way, the tiny
base knows the twelve objects, but never in their own colours: its fish swim in green or red water.
"""

import math

import numpy as np
from jaxtyping import UInt8
from numpy.random import Generator
from PIL import Image

from contradiff.toy.classes import CLASSES, Hsv, Scene, vary
from contradiff.toy.objects import Outline, Shape, box, ellipse, mix, smooth, star
from contradiff.toy.render import add_object, draw_background, light, render_image


def render_shapes(
    rng: Generator, *, image_size: int
) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Render one random picture, RGB from 0 to 255: one to three figures on a random background."""
    scene = Scene(_any_colour(rng), _any_colour(rng), has_horizon=bool(rng.random() < 0.4))
    picture = draw_background(rng, scene, image_size=image_size)
    # With probability 0.5, colours change from side to side, not from top to bottom.
    picture = np.rot90(picture) if rng.random() < 0.5 else picture
    for _ in range(int(rng.integers(1, 4))):
        picture = add_object(rng, picture, _figure(rng), math.inf, scales=(0.15, 0.45))
    return light(rng, picture)


def render_tinted(
    rng: Generator, *, image_size: int
) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Render an image of a random class and turn its hues by 60 to 300 degrees."""
    image = render_image(int(rng.integers(len(CLASSES))), rng, image_size=image_size)
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] += np.uint8(256 * rng.uniform(1 / 6, 5 / 6))  # modulo 256
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))


def _any_colour(rng: Generator) -> Hsv:
    """Draw any hue, at any saturation and brightness."""
    return rng.random(), rng.beta(1.5, 1.5), rng.beta(2.0, 1.2)


def _figure(rng: Generator) -> list[Shape]:
    """Draw a shape with up to four smaller shapes on it."""
    main, accent = (vary(rng, _any_colour(rng)) for _ in range(2))
    shapes: list[Shape] = [(_outline(rng), main)]
    for _ in range(int(rng.integers(5))):
        size, offset = rng.uniform(0.1, 0.6), rng.uniform(-0.4, 0.4, 2)
        shapes.append((_outline(rng) * size + offset, mix(main, accent, rng.uniform(0.3, 1.0))))
    return shapes


def _outline(rng: Generator) -> Outline:
    """Draw an ellipse, a star, a box, or a polygon with sharp or round corners."""
    kind = int(rng.integers(5))
    if kind == 0:
        return ellipse(0.0, 0.0, rng.uniform(0.3, 1.0), rng.uniform(0.3, 1.0))
    if kind == 1:
        return star(int(rng.integers(3, 9)), rng.uniform(0.2, 0.8), rng.uniform(0.5, 2.0))
    if kind == 2:
        width, height = rng.uniform(0.2, 1.0, 2)
        return box(-width, -height, width, height)
    number = int(rng.integers(3, 8))
    angles = np.sort(rng.uniform(0.0, 2 * math.pi, number))
    points = rng.uniform(0.4, 1.0, (number, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return smooth(*map(tuple, points)) if kind == 3 else points
