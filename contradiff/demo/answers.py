"""What a model says about an image: classes, neighbours, noised inputs and variations, as HTML."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor

from contradiff.demo.figures import bars, message, pictures, section
from contradiff.pretrained.gallery import Gallery
from contradiff.pretrained.images import to_pil
from contradiff.pretrained.model import ContraDiff

GUIDANCES = (1.0, 3.0, 8.0)
NUM_VARIATIONS = 4
"""Variations for each guidance."""
NUM_NEIGHBOURS = 6


@dataclass(frozen=True)
class Exhibit:
    """A model that the page shows. `gallery` says why there are no neighbours, if there are none.

    `num_steps` is the number of denoising steps; None: as the model was measured.
    """

    name: str
    model: ContraDiff
    gallery: Gallery | str
    num_steps: int | None = None


def answers(exhibit: Exhibit, image: Path, *, name: str, first_index: int = 0) -> Iterator[str]:
    """Yield a model's column of the page, each time with one more part.

    `name` stands for the image in messages. `first_index` is that of the first variation; another
    index is another noise. Raises ValueError if the image cannot be read.
    """
    model, pixels = exhibit.model, exhibit.model.prepare(image, name=name)
    done = _heading(exhibit)
    done += f'<div class="beside">{_classes(model, pixels)}{_noised(model, pixels)}</div>'
    done += _neighbours(exhibit, pixels)
    rows = ""
    for number, guidance in enumerate(GUIDANCES, start=1):
        yield done + _variations(rows, f"Making variations, row {number} of {len(GUIDANCES)} …")
        images = model.generate(
            NUM_VARIATIONS,
            condition=pixels,
            guidance=guidance,
            first_index=first_index,
            num_inference_steps=exhibit.num_steps,
        )
        title = f"Guidance {guidance:g}" + " (no guidance)" * (guidance == 1)
        captions = [f"noise {first_index + place}" for place in range(len(images))]
        rows += f"<h4>{title}</h4>" + pictures(images, captions, alt="variation", shown=False)
    yield done + _variations(rows)


def _heading(exhibit: Exhibit) -> str:
    config = exhibit.model.config
    training, size = config.training, config.image_size
    facts = f"λ = {training['params']['loss']['lambda']:g}, {training['num_steps']:,} steps"
    facts = f"Trained with {facts}, {len(config.class_names)} classes, {size} × {size} pixels."
    return f'<h2>{escape(exhibit.name)}</h2><p class="note">{facts}</p>'


def _classes(model: ContraDiff, pixels: Tensor) -> str:
    if model.config.probe is None:
        return section("Class", "", "This model has no classifier.")
    [found] = model.classify(pixels)
    return section("Class", bars(found.classes, found.probabilities))


def _neighbours(exhibit: Exhibit, pixels: Tensor) -> str:
    model, gallery = exhibit.model, exhibit.gallery
    if isinstance(gallery, str):
        return section("Nearest images", "", gallery)
    nearest = gallery.nearest(model.features(pixels), k=NUM_NEIGHBOURS + 1)
    found = gallery.read([place for place, _ in nearest])
    others = [
        (to_pil(neighbour), f"{gallery.captions[place]} {cosine:.2f}")
        for (place, cosine), neighbour in zip(nearest, map(model.prepare, found), strict=True)
        if not neighbour.equal(pixels)
    ]
    images, captions = zip(*others[:NUM_NEIGHBOURS], strict=True) if others else ((), ())
    note = (
        "The number is the cosine of the angle between the two features: 1 is the same direction."
    )
    title = f"Nearest of {len(gallery.captions):,} {gallery.name}"
    return section(title, pictures(images, captions, alt="neighbour"), note)


def _noised(model: ContraDiff, pixels: Tensor) -> str:
    title = "What the head reads"
    if model.config.features.noising != "direct":
        return section(title, "", "This model inverts the image instead of adding noise to it.")
    [levels] = model.noised(pixels)
    captions = [f"timestep {level.info['timestep']}" for level in levels]
    note = "The image with three amounts of noise. From these, the head computes the feature."
    return section(title, pictures(levels, captions, alt="noised image"), note)


def _variations(rows: str, waiting: str = "") -> str:
    note = "The image is the condition. The higher the guidance, the more it counts. "
    note += "Images below each other start from the same noise."
    wait = message(waiting, kind="wait") if waiting else ""
    return section("Variations", rows + wait, note)
