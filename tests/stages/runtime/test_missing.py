from stages.runtime.missing import explain

import errno
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("path", "stage", "out"),
    [
        ("build/pretrain/model.safetensors", "pretrain", "build/pretrain"),
        ("build/base", "base", "build/base"),
        ("build/manifest/timm.json", "prepare", "build/manifest/timm.json"),
        ("metrics/baselines.json", "baselines", "metrics/baselines.json"),
        ("metrics/pretrain.csv", "pretrain", "metrics/pretrain.csv"),
        ("build/figures/tsne.png", "separability", "build/figures/tsne.png"),
        ("models/tiny/unet/config.json", "pretrain_base", "models/tiny"),
    ],
)
def test_a_missing_output_of_the_pipeline_names_its_stage(
    path: str, stage: str, out: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    remedy = f"run `dvc repro {stage}`, or fetch it with `dvc pull {out}`"
    assert explain(error) == f"{path}: no such file; {remedy}"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("loss.lambda: it must not be negative"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "build/pretrain"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/images"),
        FileNotFoundError("no file at all"),
    ],
)
def test_other_errors_keep_their_message(error: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert explain(error) == str(error)


def test_outside_a_project_errors_keep_their_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "build/pretrain")
    assert explain(error) == str(error)
