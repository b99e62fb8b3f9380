"""The layout of the page, and what happens when an image is dropped on it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

from contradiff.demo.answers import NUM_VARIATIONS, Exhibit, answers
from contradiff.demo.figures import message
from contradiff.pretrained.images import to_pil

NUM_EXAMPLES = 8
SHARP_BELOW = 128
"""Images of fewer pixels are enlarged without smoothing."""
INTRODUCTION = """# ContraDiff
One diffusion model says what an image shows, finds images like it, and makes variations of it.
Drop an image, or choose an example. It stays on this computer."""
HINT = message(
    "Here you will see the image's classes, its nearest images and its variations.", kind="wait"
)
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build_page(exhibits: Sequence[Exhibit], folder: Path) -> gr.Blocks:
    """Return the page, with a column for each model. The examples are written to `folder`."""
    names = [exhibit.name for exhibit in exhibits]
    is_small = min(exhibit.model.config.image_size for exhibit in exhibits) < SHARP_BELOW
    with gr.Blocks(title="ContraDiff", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row(elem_classes=["sharp"] if is_small else None):
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=280,
                    elem_id="image",
                )
                if files := _write_examples(exhibits[0], folder):
                    gr.Examples(files, image, label="Examples")
                chosen = gr.CheckboxGroup(
                    names, value=names, label="Models", visible=len(names) > 1, elem_id="models"
                )
                more = gr.Button("Other variations")
            with gr.Column(scale=3, min_width=300), gr.Row(elem_classes=["exhibits"]):
                columns = [
                    gr.HTML(HINT, elem_classes=["exhibit"], min_width=300, apply_default_css=False)
                    for _ in names
                ]
        asked = gr.State((0, 0))  # the number of the request, and the index of its first variation
        lock = Lock()

        def answer(
            asked: tuple[int, int], file: dict[str, Any] | None, shown: list[str]
        ) -> Iterator[dict[gr.HTML, Any]]:
            own = [column for column, name in zip(columns, names, strict=True) if name in shown]
            value = HINT if file is None else message("Reading the image …", kind="wait")
            yield {column: gr.update(visible=column in own, value=value) for column in columns}
            if file is None or not own:
                return
            path, name = Path(file["path"]), file["orig_name"] or "the image"
            parts = zip(
                *(
                    answers(exhibit, path, name=name, first_index=asked[1])
                    for exhibit in exhibits
                    if exhibit.name in shown
                ),
                strict=True,
            )
            try:
                while found := _next(parts, lock):
                    yield dict(zip(own, found, strict=True))
            except ValueError as error:
                yield dict.fromkeys(own, "") | {own[0]: message(str(error), kind="fault")}

        # Without gradio's preprocessing, our own reader says what is wrong with a file.
        answering = asked.change(
            answer,
            [asked, image, chosen],
            columns,
            preprocess=False,
            trigger_mode="multiple",
            **QUIET,
        )
        steps: list[tuple[Any, Callable[[int], int]]] = [
            (image.change, lambda _: 0),
            (chosen.change, lambda first: first),
            (more.click, lambda first: first + NUM_VARIATIONS),
        ]
        for trigger, step in steps:  # each stops the answer to the last request, and asks anew

            def ask(asked: tuple[int, int], step: Callable[[int], int] = step) -> tuple[int, int]:
                return asked[0] + 1, step(asked[1])

            trigger(ask, asked, asked, cancels=[answering], trigger_mode="multiple", **QUIET)
    return page


def _next(parts: Iterator[tuple[str, ...]], lock: Lock) -> tuple[str, ...] | None:
    """Return the next part of each column. A stopped request may still compute its last one."""
    with lock:
        return next(parts, None)


def _write_examples(exhibit: Exhibit, folder: Path) -> list[str]:
    """Write images of the first model's gallery, each with another caption, as PNG files."""
    if isinstance(exhibit.gallery, str):
        return []
    places = exhibit.gallery.examples(NUM_EXAMPLES)
    files = [folder / f"example-{number}.png" for number in range(len(places))]
    for file, image in zip(files, exhibit.gallery.read(places), strict=True):
        to_pil(exhibit.model.prepare(image)).save(file)
    return list(map(str, files))
