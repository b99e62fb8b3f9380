"""The built wheel, in an empty environment and outside the project, does what users do with it."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contradiff.pretrained.model import ContraDiff

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
Run = Callable[..., str]
pytestmark = pytest.mark.slow

USERS_PROGRAM = """
import json, sys
from importlib.metadata import distributions

from diffusers import UNet2DConditionModel
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import contradiff
from contradiff import ContraDiff, ContraDiffFeatures, ContraDiffPipeline, export

project, *images = sys.argv[1:]
export("mine", root=project, with_base=True)
model = ContraDiff.from_pretrained("mine", device="cpu")
found = model.classify(images[0])[0]
model.generate(1, condition=images[0], guidance=2.0, seed=1)[0].save("sample.png")
pipeline = ContraDiffPipeline.from_pretrained("mine", device="cpu")
unet = UNet2DConditionModel.from_pretrained("mine/base/unet")
unet.load_lora_adapter("mine", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
classifier = make_pipeline(ContraDiffFeatures("mine", device="cpu"), LogisticRegression())
result = {
    "file": contradiff.__file__,
    "version": contradiff.__version__,
    "installed": [each.metadata["Name"].lower() for each in distributions()],
    "features": model.features(images).tolist(),
    "classes": found.classes,
    "images of the pipeline": len(pipeline(batch_size=2, num_inference_steps=2).images),
    "LoRA layers": sum("lora_A" in name for name in unet.state_dict()),
    "predictions": len(classifier.fit(images, [0, 1] * 4).predict(images)),
}
print(json.dumps(result))
"""


def call(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with nothing but the wheel and what it needs."""
    top = tmp_path_factory.mktemp("wheel")
    uv = [sys.executable, "-m", "uv"]
    build = ["build", "--no-build-isolation", "--python", sys.executable]
    call(*uv, *build, "--out-dir", top / "dist", ROOT, cwd=top)
    [wheel] = (top / "dist").glob("*.whl")
    call(*uv, "venv", "--python", sys.executable, top / "venv", cwd=top)
    # uv's cache has the locked versions, so that nothing is downloaded. Without --python, this uv
    # would install into its own environment.
    into = ["pip", "install", "--python", top / "venv/bin/python"]
    call(*uv, *into, "--constraint", ROOT / "requirements.lock", wheel, cwd=top)
    return top / "venv"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the project, where all programs run."""
    return tmp_path_factory.mktemp("there")


@pytest.fixture(scope="module")
def run(environment: Path, there: Path) -> Run:
    """Run a program of the environment."""

    def run(name: str, *arguments: str | Path) -> str:
        return call(environment / "bin" / name, *arguments, cwd=there, PYTHONPATH="")

    return run


@pytest.fixture(scope="module")
def result(run: Run, project: Path, photos: Path) -> dict[str, Any]:
    """What the program of a Python user gives; it leaves the export "mine"."""
    images = sorted(photos.glob("*/*.png"))
    return json.loads(run("python", "-c", USERS_PROGRAM, project, *images).splitlines()[-1])


def test_the_python_of_users(
    result: dict[str, Any], environment: Path, model: ContraDiff, photos: Path
):
    package = Path(result["file"]).parent
    assert package.is_relative_to(environment)
    assert (package / "py.typed").is_file()
    assert result["version"] == VERSION
    of_the_pipeline = {"clean-fid", "dvc", "mlflow", "pyarrow", "timm", "torch-fidelity"}
    assert of_the_pipeline & set(result["installed"]) == set()
    images = sorted(photos.glob("*/*.png"))
    np.testing.assert_allclose(result["features"], model.features(images), atol=2e-3)
    assert tuple(result["classes"]) == model.classify(images[0])[0].classes
    assert result["images of the pipeline"] == 2
    assert result["LoRA layers"] > 0
    assert result["predictions"] == 8


@pytest.mark.usefixtures("result")
def test_the_commands_of_users(run: Run, there: Path, photos: Path):
    def contradiff(*arguments: str | Path) -> str:
        return run("contradiff", *arguments)

    assert contradiff("--version").strip() == VERSION
    assert "neighbours" in contradiff("--help")
    mine, image = ["--model", "mine", "--device", "cpu"], photos / "a/0.png"
    assert json.loads(contradiff("info", "--model", "mine", "--json"))["classes"] == [*"abc"]
    assert "features.npy: 8 images, 16 values each" in contradiff("embed", photos, *mine)
    [found] = json.loads(contradiff("classify", image, *mine, "--json"))
    assert len(found["classes"]) == 3
    contradiff("generate", "-n", "2", "--steps", "2", "--condition", image, *mine)
    assert len(contradiff("neighbours", image, photos, *mine).splitlines()) == 1 + 5
    assert "Everything fits." in contradiff("plan", "--preset", "paper", "--gpus", "8")
    contradiff("preset", "single-gpu")
    assert "Everything fits." in contradiff("plan", "--gpu", "rtx4090")
    written = {path.name for path in there.iterdir()}
    assert written == {
        *("mine", "sample.png", "features.npy", "features.csv", "samples", "params.yaml")
    }


def test_a_reader_that_ends_early_gets_no_traceback(environment: Path):
    command = f"{environment}/bin/contradiff plan --preset paper | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
