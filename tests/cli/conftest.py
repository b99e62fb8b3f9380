"""An exported model with its base, and a folder of images in class folders."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from contradiff.cli.app import app
from contradiff.data.shards import read_images
from contradiff.pretrained.model import ContraDiff
from contradiff.pretrained.project import export
from tests.pretrained.conftest import project as project  # noqa: PLC0414  # a fixture


@pytest.fixture(scope="session")
def exported(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "mine"
    export(folder, root=project, with_base=True)
    return folder


@pytest.fixture(scope="session")
def model(exported: Path) -> ContraDiff:
    return ContraDiff.from_pretrained(exported, device="cpu")


@pytest.fixture(scope="session")
def photos(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images: a/0.png, b/1.png, c/2.png, a/3.png and so on."""
    folder = tmp_path_factory.mktemp("photos")
    for index, sample in enumerate(read_images(project / "build/shards", "val")):
        path = folder / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sample.image)
    return folder


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    """The same images, one of them truncated, and one of them no image at all."""
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    content = (folder / "b/1.png").read_bytes()
    (folder / "b/1.png").write_bytes(content[: len(content) // 2])
    (folder / "b/4.png").write_text("no image")
    return folder


@pytest.fixture
def call(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `contradiff` in an empty folder. MODEL stands for `--model` and the exported model."""
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    monkeypatch.delenv("CONTRADIFF_TRACEBACK", raising=False)

    def run(*arguments: str | Path, code: int = 0) -> Result:
        given = [str(each) for each in arguments]
        if "MODEL" in given:
            place = given.index("MODEL")
            given[place : place + 1] = ["--model", str(exported), "--device", "cpu"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return run
