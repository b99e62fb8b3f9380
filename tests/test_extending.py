"""The diffs in docs/extending.md can be applied to the present code, and work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USE = """
import math
import torch
from contradiff.evaluation.scores import vendi
from contradiff.features.models import load_feature_model
from contradiff.features.params import FeaturesParams
from contradiff.method.losses import CONTRASTIVE_LOSSES
from contradiff.method.params import LossParams
from contradiff.sources.transfer_set import TransferDataParams
from tests.settings import TINY

LossParams.model_validate(TINY["loss"] | {"contrastive": "uniform"})
aligned = CONTRASTIVE_LOSSES["uniform"](torch.eye(2), torch.eye(2), temperature=0.5)
torch.testing.assert_close(aligned, torch.tensor((1 + math.exp(-4)) / 2).log())
assert round(vendi(torch.eye(5)), 6) == 5.0 and round(vendi(torch.ones(5, 3)), 6) == 1.0
changes = {"model": "pixels", "pool": "mean"}
params = FeaturesParams.model_validate(TINY["features"] | changes)
assert load_feature_model(params, None, 0, torch.device("cpu")).columns[0].name == "pixels"
TransferDataParams.model_validate(TINY["transfer_data"] | {"source": "stl10"})
"""


def test_documented_extensions_apply_and_work(tmp_path: Path):
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for folder in ("contradiff", "tests", "presets"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.pyc"))
    for block in blocks:
        command = ["git", "apply", "--unidiff-zero", "-"]
        subprocess.run(command, cwd=tmp_path, input=block, text=True, check=True)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env=environment, check=True)
