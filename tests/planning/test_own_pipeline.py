"""The preset own, tried to the end: the pipeline runs on a folder, and its model is used."""

import json
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from bench._copies import copy_project, run_in
from contradiff.config import read_params
from contradiff.data.png import encode_png
from tests.settings import override

pytestmark = pytest.mark.slow

CLI = (sys.executable, "-c", "from contradiff.cli.app import app; app()")
QUICK = "pretrain.epochs=1 pretrain.warmup_epochs=0 generate.num_inference_steps=4"
QUICK += " probe.epochs=2 probe.warmup_epochs=0 extractor.epochs=1"
QUICK += " transfer.epochs=2 transfer.warmup_epochs=0"


def write_images(folder: Path, names: list[str], number: int) -> None:
    """Write smooth waves, whose direction differs from class to class."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(44), torch.arange(48), indexing="ij")
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            phase = torch.rand(3, 1, 1, generator=generator) * 6
            angle = torch.tensor(place * 1.0)
            wave = torch.sin((x * angle.cos() + y * angle.sin()) / 6 + phase)
            content = encode_png((wave * 90 + 128).to(torch.uint8))
            (folder / name / f"{index:02d}.png").write_bytes(content)


@pytest.mark.parametrize(
    ("names", "number", "stage"), [(["a", "b", "c"], 40, "track"), (["."], 120, "generate")]
)
def test_the_pipeline_runs_on_own_images_with_and_without_labels(
    tmp_path: Path, names: list[str], number: int, stage: str
):
    project, images = tmp_path / "project", tmp_path / "images"
    copy_project(project)
    write_images(images, names, number)
    said = run_in(project, *CLI, "preset", "own", "--data", str(images))
    assert ("type `dvc repro generate`" in said) == (stage == "generate")
    content = read_params(project / "params.yaml")
    override(content, QUICK)
    YAML().dump(content, project / "params.yaml")
    run_in(project, "dvc", "repro", stage)
    image = str(images / names[0] / "00.png")
    run_in(project, *CLI, "generate", "-n", "1", "--condition", image, "--device", "cpu")
    run_in(project, *CLI, "embed", str(images), "--device", "cpu")
    labels = {row.partition(",")[2] for row in (project / "features.csv").read_text().split()[1:]}
    assert labels == ({""} if names == ["."] else set(names))
    if stage == "track":
        found = run_in(project, *CLI, "classify", image, "--json", "--device", "cpu")
        assert len(json.loads(found)[0]["classes"]) == 3
