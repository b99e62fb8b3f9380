"""The commands give what the class ContraDiff gives, and say their faults in a line."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner, Result

from contradiff.cli.app import app
from contradiff.cli.presets import preset_names
from contradiff.planning.costs import GPUS
from contradiff.pretrained.model import ContraDiff

Call = Callable[..., Result]
ORDER = ["a/0.png", "a/3.png", "a/6.png", "b/1.png", "b/4.png", "b/7.png", "c/2.png", "c/5.png"]
COMMANDS = (
    *("embed", "classify", "generate", "neighbours", "export"),
    *("info", "preset", "plan", "study", "demo"),
)


def files_here() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_help_teaches_and_loads_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from contradiff.cli.app import app\n"
        "for name in sys.argv[1:]:\n"
        "    said = CliRunner().invoke(app, [name, '--help'])\n"
        "    assert f'contradiff {name} ' in said.output and said.exit_code == 0, said.output\n"
        "    assert said.output.count('<bool>') <= 1, said.output  # of --help alone\n"
        "said = CliRunner().invoke(app, ['--help']).output\n"
        "assert 'except for some images that cannot be read' in said and '130' in said\n"
        "print(*({'torch', 'diffusers', 'numpy', 'PIL', 'pyarrow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *(name for name in COMMANDS if name != "info")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("words", "found"),
    [("plan --gpu ", [*GPUS]), ("plan --preset ", preset_names()), ("preset o", ["own"])],
)
def test_the_shell_completes_values(words: str, found: list[str]):
    env = {"COMP_WORDS": f"contradiff {words}", "COMP_CWORD": str(words.count(" ") + 1)}
    env["_CONTRADIFF_COMPLETE"] = "complete_bash"
    assert CliRunner().invoke(app, [], prog_name="contradiff", env=env).stdout.split() == found


def test_embed_writes_the_features(call: Call, model: ContraDiff, photos: Path):
    expected = model.features([photos / name for name in ORDER]).numpy()
    assert (
        "out.npy: 8 images, 16 values each"
        in call("embed", photos, "MODEL", "-o", "out.npy").output
    )
    np.testing.assert_allclose(np.load("out.npy"), expected, atol=2e-3)
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert rows == [{"name": name, "label": name[0]} for name in ORDER]
    call("embed", photos, "MODEL", "-o", "features.parquet")
    table = parquet.read_table("features.parquet").to_pydict()
    assert (table["name"], table["label"]) == (ORDER, [name[0] for name in ORDER])
    np.testing.assert_allclose(table["feature"], expected, atol=2e-3)
    call("embed", photos / "c", "MODEL", "-o", "features.parquet")
    assert parquet.read_table("features.parquet").column_names == ["name", "feature"]
    assert files_here() == ["features.parquet", "out.csv", "out.npy"]


def test_damaged_files_are_skipped_with_a_count_and_a_code(
    call: Call, model: ContraDiff, photos: Path, damaged: Path
):
    expected = model.features([photos / name for name in ORDER]).numpy()
    said = call("embed", damaged, "MODEL", "-o", "out.npy", code=3).stderr
    assert f"skipped: {damaged}/b/1.png: not a readable image" in said
    assert "skipped: 2 of 8 files in all" in said
    np.testing.assert_allclose(np.load("out.npy"), expected[[0, 1, 2, 5, 6, 7]], atol=2e-3)
    found = call("classify", damaged, "MODEL", "--json", code=3)
    assert len(json.loads(found.stdout)) == 6
    found = call("neighbours", photos / "a/0.png", damaged, "MODEL", "-k", "100", code=3)
    assert len(found.stdout.splitlines()) == 1 + 6
    said = call("classify", damaged / "b/1.png", "MODEL", code=1).stderr
    assert said.endswith("contradiff: no image could be read\n")


def test_classify_prints_the_best_classes(call: Call, model: ContraDiff, photos: Path):
    paths = [photos / "b/1.png", photos / "a/0.png"]
    expected = model.classify(paths, top=2)
    found = json.loads(call("classify", *paths, "MODEL", "--top", "2", "--json").stdout)
    assert [each["image"] for each in found] == [each.name for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert tuple(each["class"] for each in one["classes"]) == other.classes
        probabilities = [each["probability"] for each in one["classes"]]
        assert probabilities == pytest.approx(other.probabilities, abs=1e-3)
    [name, first, *_] = call("classify", paths[0], "MODEL").stdout.splitlines()
    assert name == str(paths[0])
    assert first.split()[1] == expected[0].classes[0]


def test_generate_writes_the_images_and_a_grid(call: Call, model: ContraDiff, photos: Path):
    expected = model.generate(3, condition=["b", "a"], seed=1, num_inference_steps=2)
    options = ["--class", "b", "--class", "a", "--seed", "1", "--steps", "2"]
    call("generate", "MODEL", "-n", "3", *options, "-o", "new", "--grid", "new/grid.png")
    assert sorted(path.name for path in Path("new").iterdir()) == [
        *(f"{index:06d}.png" for index in range(3)),
        "grid.png",
    ]
    for image in expected:
        written = np.asarray(Image.open(f"new/{image.info['name']}.png"), dtype=int)
        assert abs(written - np.asarray(image)).max() <= 1
    assert Image.open("new/grid.png").size == (128, 128)  # 32 pixels are enlarged
    options = ["--condition", photos / "a/0.png", "--guidance", "2", "--steps", "2"]
    said = call("generate", "MODEL", "-n", "1", *options, "--grid", "one.png").stdout
    assert said == "samples: 1 images; one.png: all of them\n"
    assert Image.open("one.png").size == (64, 64)
    said = call("generate", "MODEL", "-o", "new", code=1).stderr
    assert said == "contradiff: new: the folder is not empty; choose a new one with -o\n"
    assert files_here() == ["new", "one.png", "samples"]


def test_neighbours_are_nearest_first_and_others(call: Call, model: ContraDiff, photos: Path):
    query = photos / "a/0.png"
    [found] = json.loads(call("neighbours", query, photos, "MODEL", "-k", "3", "--json").stdout)
    others = [photos / name for name in ORDER[1:]]
    cosine = torch.cosine_similarity(model.features(query), model.features(others))
    best = cosine.topk(3)
    expected = [str(others[place]) for place in best.indices]
    assert [each["image"] for each in found["neighbours"]] == expected
    assert [each["cosine"] for each in found["neighbours"]] == pytest.approx(
        best.values.tolist(), abs=1e-2
    )


def test_without_a_model_the_project_s_own_is_taken(
    call: Call, project: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(project)
    new = tmp_path / "new"
    assert f"--model {new} --base build/base" in call("export", new).stdout
    found = json.loads(call("info", "--json").stdout)
    assert found["classes"] == ["a", "b", "c"]
    assert found["cached"]["build/features"] > 1000
    said = call("info").stdout
    assert found["base"]["sha256"]["unet"] in said
    assert "build/pretrain" in said
    assert "build/pretrain" not in call("info", "--model", new).stdout
    image = photos / "a/0.png"
    own = call("classify", image, "--device", "cpu").stdout
    options = ["--model", new, "--base", "build/base", "--device", "cpu"]
    assert call("classify", image, *options).stdout == own


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("classify IMAGE", 1, "no trained model here; in the project's folder, type `make repro`"),
        ("embed PHOTOS", 1, "or name one with --model FOLDER, or --model user/name"),
        ("export new", 1, "or `dvc pull` to fetch it\n"),
        ("info", 1, "there is no trained model here"),
        ("preset papers", 1, "NAME: 'papers' is no preset; type one of: paper, single-gpu"),
        ("classify nowhere.png MODEL", 2, "'nowhere.png' does not exist"),
        ("embed EMPTY MODEL", 1, "FOLDER: EMPTY contains no images (.bmp"),
        ("classify EMPTY MODEL", 1, "IMAGE: EMPTY contains no images (.bmp"),
        ("embed PHOTOS -o features.txt", 2, "must end in .parquet or .npy"),
        ("generate MODEL --grid grid.jpg", 2, "must end in .png"),
        ("generate MODEL --class d", 1, "--class: no class is named 'd'; near are"),
        ("generate MODEL --class a --condition IMAGE", 2, "either --condition or --class"),
        ("generate MODEL --guidance 2", 1, "guidance: 2 has no effect"),
        ("generate MODEL --steps 1001", 1, "num_inference_steps"),
        ("generate -m EMPTY", 1, "EMPTY: no exported model, because it has no config.json"),
        ("generate --revision main", 2, "--revision has no effect without --model"),
        ("embed PHOTOS MODEL --device tpu", 2, "'tpu' is not cpu, cuda or a numbered GPU"),
        ("embed PHOTOS MODEL --device cuda:99", 1, "device: cuda:99 is asked for, but torch finds"),
        ("neighbours IMAGE EMPTY MODEL", 1, "FOLDER: EMPTY contains no images"),
        ("export new --private", 1, "no trained model"),
        ("demo", 1, "no trained model here; in the project's folder, type `make repro`"),
        ("demo --port 70000", 2, "--port"),
        ("demo -m a/b -m a/b", 2, "name each model once"),
        ("demo MODEL --images EMPTY", 1, "--images: EMPTY contains no images"),
    ],
)
def test_faults_are_said_in_a_line_and_nothing_is_left(
    call: Call, photos: Path, tmp_path: Path, *, arguments: str, code: int, message: str
):
    names = {"IMAGE": str(photos / "a/0.png"), "PHOTOS": str(photos), "EMPTY": str(tmp_path / "e")}
    (tmp_path / "e").mkdir()
    said = call(*(names.get(word, word) for word in arguments.split()), code=code).stderr
    message = message.replace("EMPTY", names["EMPTY"])
    if code == 1:
        assert said.startswith("contradiff: ")
        assert said.count("\n") == 1
    else:  # typer folds these into a box
        said = " ".join(said.replace("│", " ").split())
    assert message in said
    assert files_here() == []


def test_the_page_gets_its_models_and_its_images(
    call: Call, project: Path, exported: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    served: list[Any] = []

    @contextmanager
    def serve(exhibits: list[Any], *, port: int | None) -> Iterator[str]:
        served.append((exhibits, port))
        yield "http://here"

    class CtrlC:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("contradiff.demo.server.serve", serve)
    monkeypatch.setattr("contradiff.cli.app.Event", CtrlC)
    assert "http://here" in call("demo", "MODEL", "--steps", "2", code=130).stdout
    call("demo", "MODEL", "--images", photos, code=130)
    monkeypatch.chdir(project)
    call("demo", "--device", "cpu", code=130)
    shutil.copytree(project, new := exported.parent / "new", symlinks=True)
    shutil.rmtree(new / "build/features")
    monkeypatch.chdir(new)
    call("demo", "--device", "cpu", code=130)
    [[first], [second], [third], [fourth]] = [exhibits for exhibits, _ in served]
    assert (first.name, first.num_steps) == (str(exported), 2)
    assert "start the page with a folder of images: --images FOLDER" in first.gallery
    assert second.gallery.captions == [name[0] for name in ORDER]
    assert second.gallery.read([7, 0]) == [photos / ORDER[7], photos / ORDER[0]]
    assert (third.name, third.gallery.name) == ("build/pretrain", "validation images")
    assert third.gallery.captions == list("abcabcab")
    assert "there are no features; run `dvc repro features`" in fourth.gallery
    assert "or start the page with --images FOLDER" in fourth.gallery


def test_a_port_in_use_and_a_missing_gradio_are_said(call: Call, monkeypatch: pytest.MonkeyPatch):
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = call("demo", "MODEL", "--port", str(port), code=1).stderr
    assert said.startswith(f"contradiff: --port: port {port} cannot be used (Address already in")
    assert said.endswith("choose another one, or leave it out\n")
    monkeypatch.setattr("contradiff.cli.demo.find_spec", lambda _: None)
    said = call("demo", "MODEL", code=1).stderr
    assert said == "contradiff: the page needs gradio; type `pip install -e '.[demo]'`\n"


def test_an_export_of_another_base_and_a_newer_one_are_refused(
    call: Call, exported: Path, tmp_path: Path, photos: Path
):
    other, image = tmp_path / "other", photos / "a/0.png"
    for folder in ("unet", "vae", "scheduler"):
        (other / folder).mkdir(parents=True)
    said = call("classify", image, "MODEL", "--base", other, code=1).stderr
    digest = json.loads((exported / "config.json").read_text())["base"]["sha256"]["unet"]
    assert "is not the base that" in said
    assert f"the unet of models/tiny has the sha256 {digest}, but this one has no file" in said
    newer = json.loads((exported / "config.json").read_text()) | {"format": 99}
    (other / "config.json").write_text(json.dumps(newer))
    said = call("classify", image, "--model", other, code=1).stderr
    assert "written by a newer contradiff (format 99" in said


@pytest.mark.parametrize(
    ("size", "mode", "code", "message"),
    [
        ((20_000, 8), "RGB", 0, ""),
        ((20_000, 20_000), "1", 1, "(400000000 pixels) exceeds limit of"),
        ((8, 8), "F", 1, "pixels of Pillow's mode F have no known range"),
        ((8, 8), "I;16", 0, ""),
    ],
)
def test_unusual_images(call: Call, *, size: tuple[int, int], mode: str, code: int, message: str):
    Image.new(mode, size).save("a.tiff")
    assert message in call("classify", "a.tiff", "MODEL", code=code).stderr


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (torch.OutOfMemoryError("CUDA"), 1, "memory is full; set a smaller --batch-size"),
        (OSError(28, "No space left on device"), 1, "no space is left on the disk"),
    ],
)
def test_a_command_that_is_stopped_leaves_nothing(
    call: Call,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fault: BaseException,
    code: int,
    message: str,
):
    def stop(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(ContraDiff, "features", stop)
    monkeypatch.setattr(ContraDiff, "generate", stop)
    for command in (["embed", photos], ["generate", "--grid", "grid.png"]):
        assert message in call(*command, "MODEL", code=code).stderr
    assert files_here() == []
