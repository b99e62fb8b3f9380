"""`make preset NAME=own`: every form of a folder gives parameters that the pipeline accepts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from contradiff.cli.presets import use_preset
from contradiff.config import PRESETS, read_params
from stages.validate import check


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, number: int, *, side: int = 40) -> None:
    folder.mkdir(parents=True)
    for index in range(number):
        Image.new("RGB", (side + 8, side), (index, 0, 0)).save(folder / f"{index:03d}.png")


def with_val(images: Path) -> None:
    for split, number in (("train", 40), ("val", 5)):
        for name in ("cat", "dog"):
            write(images / split / name, number)


def without_val(images: Path) -> None:
    for name in ("cat", "dog"):
        write(images / name, 45)


def only_train(images: Path) -> None:
    without_val(images / "train")


def unlabelled(images: Path) -> None:
    write(images, 90)  # every tenth of 90 is 9 for validation


FORMS = [(with_val, 2), (without_val, 2), (only_train, 2), (unlabelled, 1)]


@pytest.mark.parametrize(("form", "num_classes"), FORMS)
def test_every_form_of_a_folder_gives_valid_parameters(
    project: Path,
    form: Callable[[Path], None],
    num_classes: int,
):
    form(project / "images")
    said = "\n".join(use_preset("own", Path("images")))
    content = read_params(project / "params.yaml")
    check(content, source="params.yaml")
    num_val = 10 if num_classes == 2 else 9
    assert (
        f"{90 - num_val} training and {num_val} validation images, classes: {num_classes}" in said
    )
    assert ("left out are probe" in said) == (num_classes == 1)
    assert content["transfer_data"]["source"] == "digits"
    assert content["pretrain"]["batch_size"] <= 8
    root = project / content["data"]["root"]
    assert len([*root.glob("train/*/*")]) == 90 - num_val
    assert all(path.is_file() for path in root.glob("*/*/*"))
    shown = (project / "params.yaml").read_text()
    assert shown.count("#") >= (PRESETS / "tiny.yaml").read_text().count("#") - 1


@pytest.mark.parametrize(("side", "pixels"), [(40, 32), (200, 256)])
def test_the_size_of_the_images_chooses_the_base(project: Path, side: int, pixels: int):
    write(project / "images/a", 45, side=side)
    write(project / "images/b", 45, side=side)
    use_preset("own", Path("images"))
    content = read_params(project / "params.yaml")
    check(content, source="params.yaml")
    assert content["data"]["image_size"] == pixels


@pytest.mark.parametrize(
    ("number", "data", "message"),
    [
        (0, "nowhere", "there is no folder"),
        (0, "images", "two images or more are needed"),
        (1, "images", "two images or more are needed"),
        (0, None, "type `contradiff preset own --data FOLDER`"),
    ],
)
def test_a_folder_without_enough_images_is_refused(
    project: Path, number: int, data: str | None, message: str
):
    write(project / "images", number)
    with pytest.raises(ValueError, match=message):
        use_preset("own", data and Path(data))
    assert not (project / "params.yaml").exists()
