"""docs/finished_run.ipynb opens a finished run, and git has it without outputs."""

import json
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/finished_run.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_all_cells_run(
    project: Path, samples: Callable[..., Any], capsys: pytest.CaptureFixture[str]
):
    made = samples()
    names: dict[str, Any] = {}
    (project / "docs").mkdir(exist_ok=True)
    with chdir(project / "docs"):  # Jupyter starts in the notebook's folder
        for cell in CELLS:
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    said = capsys.readouterr().out
    assert f"{len(made)} samples" in said
    reported = json.loads((project / "metrics/probe.json").read_text())["probe"]["top1"]
    assert f"{names['top1']:.1%} here, {reported:.1%} in metrics/probe.json" in said
    assert names["h"].shape == (4, names["model"].width)
    assert isinstance(names["image"], Image.Image)


def test_no_output_is_stored():
    assert [cell for cell in CELLS if cell["outputs"] or cell["execution_count"]] == []
