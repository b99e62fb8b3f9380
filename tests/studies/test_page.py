"""The pages in docs/studies come from the committed results alone, byte for byte."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from contradiff.cli.app import app
from contradiff.studies.collecting import first_row_of
from contradiff.studies.page import pages
from contradiff.studies.store import Store
from contradiff.studies.study import read_study
from tests.studies.project import add_experiment, git, params

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted(path.stem for path in (ROOT / "studies/results").glob("*.json"))


@pytest.mark.parametrize("name", COMMITTED)
def test_a_fresh_clone_writes_the_committed_pages(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A clone has no experiments, and perhaps other parameters; neither may matter."""
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    for folder in (ROOT / "docs/studies").glob("*-samples"):
        shutil.copytree(folder, tmp_path / "docs/studies" / folder.name)
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    shutil.copyfile(ROOT / "presets/smoke.yaml", tmp_path / "params.yaml")
    git(tmp_path, "init", "-q")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["study", name, "--report"])
    assert result.exit_code == 0, result.output
    found = (tmp_path / "docs/studies").iterdir()
    written = {path.relative_to(tmp_path) for path in found if path.is_file()}
    there = {path.relative_to(ROOT) for path in (ROOT / "docs/studies").glob(f"{name}[.-]*")}
    mine = {path for path in there if path.name.partition(".")[0] in (name, *_figures(name))}
    assert written == mine
    for path in (*written, Path(f"studies/results/{name}.json")):
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), path


def _figures(name: str) -> tuple[str, str]:
    return f"{name}-bubble", f"{name}-training"


def test_what_is_missing_shows_as_missing(project: Path):
    text = pages(project, "lambdas", read_study(project, "lambdas"), Store())["lambdas.md"]
    assert "| another method | – | 70.0 | – |" in text
    assert "| λ = 0 | missing | 78.0 | missing |" in text
    assert "- λ = 0.1 (`loss.lambda=0.1`): seed 0, 1" in text


@pytest.mark.usefixtures("dvc")
def test_means_differences_and_what_is_set_aside(project: Path):
    for seed, weight, top1, fid in (
        *((0, 0, 0.70, 12.0), (1, 0, 0.72, 11.0)),
        *((0, 0.1, 0.80, 12.5), (1, 0.1, 0.83, 10.5)),
    ):
        content = params(seed=seed, loss={"lambda": weight})
        add_experiment(project, f"e{seed}-{weight}", content, top1=top1, fid=fid)
    few = params(generate={"num_samples": 10})
    add_experiment(project, "few", few)
    result = CliRunner().invoke(app, ["study", "lambdas", "--report"])
    assert result.exit_code == 0, result.output
    text = (project / "docs/studies/lambdas.md").read_text()
    assert "| λ = 0 | 71.0% ± 1.4 | 78.0 | 11.50 ± 0.71 |" in text
    assert "| λ = 0.1 | 81.5% ± 2.1 | – | 11.50 ± 1.41 |" in text
    # t(0.975, 1) = 12.706; the differences' standard errors are 0.5 points and 0.5.
    assert "| λ = 0.1 | **+10.5 [+4.1, +16.9]** | +0.00 [-6.35, +6.35] |" in text
    assert "few (" in text
    assert "generate.num_samples 10 instead of 1000" in text
    lines = (project / "docs/studies/lambdas.csv").read_text().splitlines()
    assert lines[0] == "row,changes,seed,experiment,revision,top1,fid"
    assert lines[4].startswith("λ = 0.1,loss.lambda=0.1,1,e1-0.1 (")
    assert lines[4].endswith(",0.83,10.5")
    for file in ("lambdas.svg", "lambdas-training.svg"):
        assert (project / "docs/studies" / file).read_text().startswith("<?xml")


def test_the_first_row_of_samples():
    import io

    from PIL import Image

    image = Image.new("RGB", (64, 12))
    image.paste((255, 0, 0), (0, 4, 64, 12))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    row = Image.open(io.BytesIO(first_row_of(buffer.getvalue())))
    assert row.size == (64, 4)
    assert row.getcolors() == [(256, (0, 0, 0))]
