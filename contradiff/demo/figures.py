"""The HTML of the page's figures: bars, and rows of pictures. Every text is escaped."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image


def section(title: str, content: str, note: str = "") -> str:
    """Return a part of the page: a title, its content, and a note that explains it."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h3>{escape(title)}</h3>{content}{below}</section>"


def bars(names: Sequence[str], fractions: Sequence[float]) -> str:
    """Return a table with a bar for each fraction (0 to 1)."""
    rows = (
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td class="bar"><div style="width: {fraction:.1%}"></div></td>'
        f"<td>{fraction:.1%}</td></tr>"
        for name, fraction in zip(names, fractions, strict=True)
    )
    return f'<table class="bars">{"".join(rows)}</table>'


def pictures(
    images: Iterable[Image.Image], captions: Iterable[str], *, alt: str, shown: bool = True
) -> str:
    """Return a row of images. The page needs no files for them, as their PNGs are in the HTML.

    Captions that are not `shown` are read by screen readers alone.
    """
    figures = (
        f'<figure><img alt="{escape(f"{alt}: {caption}")}" src="{_source(image)}">'
        f"{f'<figcaption>{escape(caption)}</figcaption>' if shown else ''}</figure>"
        for image, caption in zip(images, captions, strict=True)
    )
    return f'<div class="pictures">{"".join(figures)}</div>'


def message(text: str, *, kind: str) -> str:
    """Return a line that screen readers announce. `kind` is "wait" or "fault"."""
    role = "alert" if kind == "fault" else "status"
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'


def _source(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
