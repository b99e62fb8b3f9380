"""The page shows what the model's own calls return."""

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contradiff.data.shards import read_images
from contradiff.demo.answers import GUIDANCES, NUM_NEIGHBOURS, NUM_VARIATIONS, Exhibit, answers
from contradiff.pretrained.gallery import Gallery, validation_gallery
from contradiff.pretrained.model import ContraDiff
from tests.pretrained.conftest import project as project  # noqa: PLC0414  # a fixture

Figures = dict[str, list[tuple[str, np.ndarray]]]


@pytest.fixture(scope="module")
def exhibit(project: Path) -> Exhibit:
    model = ContraDiff.from_project(project, device="cpu")
    return Exhibit("<mine>", model, validation_gallery(project, model.class_names))


@pytest.fixture(scope="module")
def stored(project: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The validation images as files."""
    folder = tmp_path_factory.mktemp("stored")
    samples = list(read_images(project / "build/shards", "val"))
    for index, sample in enumerate(samples):
        (folder / f"{index}.png").write_bytes(sample.image)
    return [folder / f"{index}.png" for index in range(len(samples))]


def pixels(images: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


def figures(html: str) -> Figures:
    """Return the pictures of each kind: what the text says, and the pixels."""
    found: Figures = {}
    for kind, text, content in re.findall(
        r'<img alt="([^":]*): ([^"]*)" src="data:image/png;base64,([^"]*)">', html
    ):
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        found.setdefault(kind, []).append((text, np.asarray(image)))
    return found


def sections(steps: Iterator[str]) -> list[list[str]]:
    return [re.findall(r"<h[34]>([^<]*)<", html) for html in steps]


def test_the_page_shows_what_the_model_returns(exhibit: Exhibit, stored: list[Path]):
    model, image = exhibit.model, stored[3]
    *_, html = answers(exhibit, image, name="a.png", first_index=4)
    [found] = model.classify(image)
    rows = re.findall(r'<th scope="row">(\w)</th><td .*?width: ([\d.]+)%.*?<td>([\d.]+)%', html)
    assert [name for name, _, _ in rows] == list(found.classes)
    shown = [[float(width), float(text)] for _, width, text in rows]
    expected = [[100 * value] * 2 for value in found.probabilities]  # the bar's and the text's
    np.testing.assert_allclose(shown, expected, atol=0.06)

    pictures = figures(html)
    assert sorted(pictures) == ["neighbour", "noised image", "variation"]
    others = [number for number in range(8) if number != 3]  # not the image itself
    h = model.features(stored, indices=range(8))
    cosines = torch.cosine_similarity(model.features(image), h[others])
    for rank, place in enumerate(cosines.argsort(descending=True)[:NUM_NEIGHBOURS].tolist()):
        text, shown_image = pictures["neighbour"][rank]
        expected = model.prepare(stored[others[place]]).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(shown_image, expected)
        assert text == f"{'abc'[others[place] % 3]} {cosines[place]:.2f}"
    assert len(pictures["neighbour"]) == NUM_NEIGHBOURS

    [levels] = model.noised(image)
    expected = [f"timestep {timestep}" for timestep in (401, 201, 101)]
    assert [text for text, _ in pictures["noised image"]] == expected
    np.testing.assert_equal([found for _, found in pictures["noised image"]], pixels(levels))

    made = [
        made
        for guidance in GUIDANCES
        for made in model.generate(4, condition=image, guidance=guidance, first_index=4)
    ]
    assert NUM_VARIATIONS == 4
    assert [text for text, _ in pictures["variation"]] == [f"noise {n}" for n in (4, 5, 6, 7)] * 3
    np.testing.assert_equal([found for _, found in pictures["variation"]], pixels(made))


def test_the_page_grows_by_a_row_of_variations(exhibit: Exhibit, stored: list[Path]):
    rows = ["Guidance 1 (no guidance)", "Guidance 3", "Guidance 8"]
    first = ["Class", "What the head reads", "Nearest of 8 validation images", "Variations"]
    steps = list(answers(exhibit, stored[0], name="a.png"))
    assert sections(iter(steps)) == [first + rows[:n] for n in range(4)]
    assert ["Making variations" in html for html in steps] == [True, True, True, False]


def test_what_is_missing_is_said(exhibit: Exhibit, stored: list[Path]):
    model = exhibit.model
    other = ContraDiff.__new__(ContraDiff)
    vars(other).update(vars(model))
    inverting = model.config.features.model_copy(update={"noising": "ddim_chain"})
    other.config = model.config.model_copy(update={"probe": None, "features": inverting})
    html = next(answers(replace(exhibit, model=other, gallery="<none>"), stored[0], name="a.png"))
    assert list(figures(html)) == []
    for text in ("no classifier", "inverts the image", "&lt;none&gt;", "<h2>&lt;mine&gt;</h2>"):
        assert text in html


def test_a_file_that_is_no_image_is_named(exhibit: Exhibit):
    with pytest.raises(ValueError, match=r"a\.png: not a readable image \(unknown format\)"):
        next(answers(exhibit, Path(__file__), name="a.png"))


def test_a_gallery_gives_each_caption_once_and_no_more_neighbours_than_images():
    gallery = Gallery("images", ["b", "a", "b", "c"], torch.eye(4), list)
    assert gallery.examples(2) == [0, 1]
    assert gallery.examples(9) == [0, 1, 3]
    feature = torch.tensor([[0.0, 3.0, 0.0, 4.0]])
    assert gallery.nearest(feature, k=2) == [(3, pytest.approx(0.8)), (1, pytest.approx(0.6))]
    assert len(gallery.nearest(feature, k=9)) == 4


def test_features_of_another_model_are_refused(project: Path, tmp_path: Path):
    (tmp_path / "build/pretrain").mkdir(parents=True)
    for name in ("base", "shards", "features"):
        (tmp_path / "build" / name).symlink_to(project / "build" / name)
    (tmp_path / "build/pretrain/config.json").write_text("{}")
    with pytest.raises(ValueError, match="the checkpoint or the base has changed"):
        validation_gallery(tmp_path, ["a", "b", "c"])
