"""stages.reference and stages.score: what the metrics say, and what is refused by name."""

from stages.runtime import measuring as _measuring
from stages.runtime.run import Run, RuntimeParams

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

from bench import peers
from contradiff.config import parse, read_params
from contradiff.data.png import encode_png
from contradiff.data.shard_info import ImageInfo, SampleInfo, ShardInfo
from contradiff.data.shards import Sample, ShardIndex, image_record, write_split
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import save_classifier, save_inception
from contradiff.files import sha256_of
from stages import reference, score

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path("build")
COUNT = 40


def write_images(folder: Path, split: str, info: ShardInfo, *, seed: int, side: int = 32):
    """Forty pictures in shards of 16; generated ones have no label."""
    images = peers.pictures(COUNT, side=side, seed=seed, contrast=40.0 + 10 * seed)
    samples = [Sample(f"{i:06d}", encode_png(image), i % 3) for i, image in enumerate(images)]
    records = [image_record(sample, extension="png") for sample in samples]
    shards = write_split(folder, split, records, samples_per_shard=16, compression="none")
    ShardIndex({split: shards}, info).write(folder)


def use_classifier() -> None:
    torch.manual_seed(0)
    classifier = ResidualClassifier(width=4, num_classes=3)
    save_classifier(
        BUILD / "extractor", classifier, image_size=32, val_accuracy=0.9, val_count=COUNT
    )


def use_inception(num_features: int) -> None:
    """Its TorchScript's parts, with few features."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, num_features, 4, stride=32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    path = Path("script.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(peers.Scripted(layers, torch.randn(5, num_features)).eval()).save(
            str(path)
        )
    save_inception(
        BUILD / "extractor",
        path,
        resizers=["clean", "legacy_tensorflow"],
        pinned=(sha256_of(path),),
    )


@pytest.fixture
def run(run_of: Callable[[str], Run]) -> Run:
    """In a folder with build/shards, samples and extractor."""
    write_images(BUILD / "shards", "val", ImageInfo(class_ids=("a", "b", "c")), seed=0, side=36)
    info = SampleInfo(condition="unconditional: c(noise)", guidance=1.0)
    write_images(BUILD / "samples", "sample", info, seed=1)
    use_classifier()
    return run_of("score")


def content(**changes: Any) -> dict[str, Any]:
    params = read_params(ROOT / "presets/tiny.yaml")
    params["reference"] |= {"num_kept": 30, "batch_size": 10}
    params["score"] |= {"kid_subset_size": 20, "splits": 3, "batch_size": 7} | changes
    return params


def make_reference(run: Run) -> None:
    params = parse(reference.Params, content(), source="params.yaml")
    reference.main(params, Run(stage="reference", root=run.root, runtime=run.runtime))


def make_score(run: Run, **changes: Any) -> dict[str, Any]:
    score.main(parse(score.Params, content(**changes), source="params.yaml"), run)
    return json.loads(Path("metrics/score.json").read_text())["score"]


VALUES = {
    "fid",
    "kid",
    "kid_std",
    "precision",
    "recall",
    "density",
    "coverage",
    "inception_score",
    "inception_score_std",
}


def test_metrics_state_all_that_decides_a_score(run: Run, capsys: pytest.CaptureFixture[str]):
    make_reference(run)
    metrics = make_score(run)
    facts = {name: value for name, value in metrics.items() if name not in VALUES}
    card = json.loads((BUILD / "reference/reference.json").read_text())
    assert facts == {
        "biased": True,
        "num_samples": COUNT,
        "num_reference": COUNT,
        "num_kept": 30,
        "condition": "unconditional: c(noise)",
        "guidance": 1.0,
        "reference": "40 val images, centre crop 32 px",
        "reference_sha256": card["images_sha256"],
        "extractor": "domain-classifier",
        "extractor_accuracy": 0.9,
        "resizer": "none",
        "seed": 0,
    }
    assert metrics["fid"] > 0
    assert "FID is biased upwards" in capsys.readouterr().err
    assert list((run.root / ".work/score").iterdir()) == []


def test_of_the_reference_itself_the_scores_are_perfect(run: Run):
    images = peers.pictures(COUNT, side=32, seed=0, contrast=40.0)
    for name, split in (("shards", "val"), ("samples", "sample")):
        records = [
            image_record(Sample(f"{i:06d}", encode_png(image), 0), extension="png")
            for i, image in enumerate(images)
        ]
        shutil.rmtree(BUILD / name)
        shards = write_split(BUILD / name, split, records, samples_per_shard=13, compression="none")
        info = ShardInfo(class_ids=("a",), condition="c", guidance=1.0)
        ShardIndex({split: shards}, info).write(BUILD / name)
    make_reference(run)
    metrics = make_score(run)
    assert metrics["fid"] == pytest.approx(0, abs=1e-5)
    assert metrics["kid"] < 0.01
    assert (metrics["precision"], metrics["recall"], metrics["coverage"]) == (1, 1, 1)


def test_inception_s_resizers_stand_side_by_side(run: Run):
    use_inception(16)
    make_reference(run)
    metrics = make_score(run)
    assert metrics["extractor"] == "inception-2015-12-05"
    assert metrics["extractor_accuracy"] is None
    assert metrics["resizer"] == "clean"
    assert set(metrics["legacy_tensorflow"]) == VALUES
    assert metrics["legacy_tensorflow"]["fid"] != metrics["fid"]


def test_too_few_images_are_refused_before_any_is_seen(run: Run, monkeypatch: pytest.MonkeyPatch):
    use_inception(COUNT + 1)
    for stage in (reference, score):
        monkeypatch.setattr(stage, "load_extractor", None)
    with pytest.raises(ValueError, match=r"40 samples \(40 val images.* of 41 feature dimensions"):
        make_reference(run)


def test_reference_of_another_extractor_is_refused(run: Run):
    make_reference(run)
    use_inception(16)
    with pytest.raises(ValueError, match="reference was made with extractor domain-classifier"):
        make_score(run)


def test_images_of_other_sizes_are_refused_by_name(run: Run):
    make_reference(run)
    shutil.rmtree(BUILD / "samples")
    sizes = [32] * 30 + [24] * 10
    records = [
        {"__key__": f"{i:06d}".encode(), "png": encode_png(torch.zeros(3, side, side).byte())}
        for i, side in enumerate(sizes)
    ]
    shards = write_split(
        BUILD / "samples", "sample", records, samples_per_shard=16, compression="none"
    )
    ShardIndex({"sample": shards}, SampleInfo(condition="c", guidance=1.0)).write(BUILD / "samples")
    with pytest.raises(ValueError, match=r"image 000030 has 24x24 pixels, not 32x32"):
        make_score(run)


def test_kid_of_larger_subsets_than_are_kept_is_refused(run: Run):
    make_reference(run)
    with pytest.raises(ValueError, match=r"score.kid_subset_size is 31; .* from 2 to 30"):
        make_score(run, kid_subset_size=31)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(run: Run):
    with Path("params.yaml").open("w") as file:
        YAML().dump(content(), file)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
    results: list[list[bytes]] = []
    for count in ("1", "2"):
        for stage in ("reference", "score"):
            command = [sys.executable, "-m", f"stages.{stage}"]
            subprocess.run(
                command, check=True, env=environment | {"CONTRADIFF_NUM_PROCESSES": count}
            )
        files = [*sorted((BUILD / "reference").iterdir()), Path("metrics/score.json")]
        results.append([path.read_bytes() for path in files])
    assert results[0] == results[1]
    assert run.is_main


def test_nobody_measures_before_the_main_process_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    accelerator: Any = SimpleNamespace(
        process_index=1,
        num_processes=2,
        is_main_process=False,
        wait_for_everyone=lambda: events.append("wait"),
    )
    monkeypatch.setattr(_measuring, "measure_shards", lambda *_, **__: events.append("measure"))
    runtime = RuntimeParams(device="cpu", num_workers=0, log_every=1, checkpoint_every=1)
    nothing: Any = None
    found = _measuring.measure_set(
        [],
        nothing,
        nothing,
        tmp_path,
        run=Run(stage="score", root=tmp_path, runtime=runtime),
        accelerator=accelerator,
        reference="nothing",
        num_kept=1,
        splits=None,
        seed=0,
    )
    assert found == {}
    assert events == ["wait", "measure", "wait"]
