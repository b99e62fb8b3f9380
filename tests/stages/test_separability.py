"""stages.separability: both models on the same validation images."""

from stages.runtime.run import Run

import json
from pathlib import Path

from contradiff.config import parse
from contradiff.report.results import SeparabilityRecord
from stages import separability
from tests.settings import ARCHITECTURE, TINY


def test_stage_writes_its_outs(trained_project: Run):
    content = ARCHITECTURE | {
        "seed": 0,
        "features": TINY["features"] | {"batch_size": 3},
        "separability": {"num_images": 7, "num_classes": 3, "num_neighbours": 2},
    }
    params = parse(separability.Params, content, source="params.yaml")
    separability.main(params, trained_project)
    written = [
        Path("build/figures/tsne.png"),
        Path("build/figures/tsne_dark.png"),
        Path("metrics/separability.json"),
    ]
    first = [path.read_bytes() for path in written]
    metrics = json.loads(first[-1])["separability"]
    assert metrics.keys() == SeparabilityRecord.model_fields.keys()
    assert metrics["num_images"] == 7
    for name in ("base", "contradiff"):
        assert 0 <= metrics[name]["knn"] <= 1
        assert -1 <= metrics[name]["silhouette"] <= 1
    assert metrics["base"] != metrics["contradiff"]
    assert metrics["denoising_error"]["num_images"] == 8
    assert metrics["diagnostics"]["num_images"] == 4
    separability.main(params, trained_project)
    assert [path.read_bytes() for path in written] == first
