"""stages.reference and stages.score: what the metrics say, and what is refused."""

from stages.runtime.run import Run

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor

from bench.fid import pictures
from contradiff.config import parse, read_params
from contradiff.data.png import encode_png
from contradiff.data.shard_info import ShardInfo
from contradiff.data.shards import Sample, ShardIndex, image_record, write_split
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import Extractor, ExtractorCard, save_classifier
from stages import reference, score

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path("build")
COUNT = 40
VALUES = {"fid", "kid", "kid_std", "precision", "recall", "density", "coverage"}
VALUES |= {"inception_score", "inception_score_std"}


def write_images(name: str, split: str, images: Iterable[Tensor], *, samples_per_shard: int = 16):
    samples = (Sample(f"{i:06d}", encode_png(image), i % 3) for i, image in enumerate(images))
    records = [image_record(sample, extension="png") for sample in samples]
    shutil.rmtree(folder := BUILD / name, ignore_errors=True)
    size = samples_per_shard
    shards = write_split(folder, split, records, samples_per_shard=size, compression="none")
    info = ShardInfo(class_ids=("a", "b", "c"), condition="unconditional: c(noise)", guidance=1.0)
    ShardIndex({split: shards}, info).write(folder)


@pytest.fixture
def run(run_of: Callable[[str], Run]) -> Run:
    """In a folder with build/shards, samples and extractor."""
    write_images("shards", "val", pictures(COUNT, side=36, seed=0, contrast=40.0))
    write_images("samples", "sample", pictures(COUNT, side=32, seed=1, contrast=50.0))
    torch.manual_seed(0)
    facts = {"image_size": 32, "val_accuracy": 0.9, "val_count": COUNT, "val_chance": 0.35}
    save_classifier(BUILD / "extractor", ResidualClassifier(width=4, num_classes=3), **facts)
    return run_of("score")


CARD = {"kind": "inception", "name": "inception-2015-12-05", "weights_sha256": "1" * 64}
CARD |= {"resizers": ["clean", "legacy_tensorflow"], "num_features": 16, "num_classes": 3}


class TwoResizers(Extractor):
    """Stands for Inception, whose 2048 dimensions would need as many images."""

    card = ExtractorCard.model_validate(CARD)

    def __init__(self) -> None: ...

    def prepare(self, image: Tensor, *, resizer: str) -> Tensor:
        return image if resizer == "clean" else image[:, ::2, ::2]

    def __call__(self, images: Tensor, *, resizer: str) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        side = images.shape[-1] // 4
        features = torch.nn.functional.avg_pool2d(images[:, 0].float(), side).flatten(1)
        return features, features[:, :3] / 50


def use_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    (BUILD / "extractor/extractor.json").write_text(TwoResizers.card.model_dump_json())
    for stage in (reference, score):
        monkeypatch.setattr(stage, "load_extractor", lambda *_, **__: TwoResizers())


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


def test_metrics_state_all_that_decides_a_score(run: Run, capsys: pytest.CaptureFixture[str]):
    make_reference(run)
    metrics = make_score(run)
    shards = json.loads((BUILD / "shards/index.json").read_text())["splits"]["val"]
    digests = "\n".join(shard["sha256"] for shard in shards)
    facts = {"biased": True, "num_samples": COUNT, "num_reference": COUNT, "num_kept": 30}
    facts |= {"condition": "unconditional: c(noise)", "guidance": 1.0, "resizer": "none", "seed": 0}
    facts |= {"extractor": "domain-classifier", "extractor_accuracy": 0.9}
    facts["reference"] = "40 val images, centre crop 32 px"
    facts["reference_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
    facts["withheld"] = None
    assert {name: value for name, value in metrics.items() if name not in VALUES} == facts
    assert metrics["fid"] > 0
    assert "FID is too large" in capsys.readouterr().err
    assert list((run.root / ".work/score").iterdir()) == []


def test_a_classifier_near_chance_yields_no_scores(run: Run, capsys: pytest.CaptureFixture[str]):
    card = json.loads((BUILD / "extractor/extractor.json").read_text())
    weak = card | {"val_accuracy": 0.5, "val_chance": 0.35}  # 20 of 40: the interval is from 35.2%
    (BUILD / "extractor/extractor.json").write_text(json.dumps(weak))
    make_reference(run)
    metrics = make_score(run)
    assert {metrics[name] for name in VALUES} == {None}
    assert "right on 50.0% of 40 validation images (95% interval from 35.2%)" in metrics["withheld"]
    said = capsys.readouterr().err
    assert metrics["withheld"] in said
    assert "FID" not in said


def test_the_scores_of_the_reference_itself_are_perfect(run: Run):
    images = pictures(COUNT, side=32, seed=0, contrast=40.0)
    write_images("shards", "val", images, samples_per_shard=13)
    write_images("samples", "sample", images)
    make_reference(run)
    metrics = make_score(run)
    assert metrics["fid"] == pytest.approx(0, abs=1e-5)
    assert metrics["kid"] < 0.01
    assert (metrics["precision"], metrics["recall"], metrics["coverage"]) == (1, 1, 1)


def test_the_resizers_stand_side_by_side(run: Run, monkeypatch: pytest.MonkeyPatch):
    use_inception(monkeypatch)
    make_reference(run)
    metrics = make_score(run)
    assert (metrics["extractor"], metrics["resizer"]) == ("inception-2015-12-05", "clean")
    assert metrics["extractor_accuracy"] is None
    assert set(metrics["legacy_tensorflow"]) == VALUES
    assert metrics["legacy_tensorflow"]["fid"] != metrics["fid"]


def test_too_few_images_are_refused_before_any_is_seen(run: Run, monkeypatch: pytest.MonkeyPatch):
    use_inception(monkeypatch)
    monkeypatch.setattr(reference, "load_extractor", None)
    write_images("shards", "val", pictures(15, side=32, seed=0, contrast=40.0))
    with pytest.raises(ValueError, match="needs at least 16 images, but the split has 15;"):
        make_reference(run)


def test_large_kid_subsets_and_images_of_other_sizes_are_refused_by_name(run: Run):
    make_reference(run)
    with pytest.raises(ValueError, match=r"score.kid_subset_size: 31 is more than 30"):
        make_score(run, kid_subset_size=31)
    sides = [32] * 30 + [24] * 10
    images = [torch.zeros(3, side, side, dtype=torch.uint8) for side in sides]
    write_images("samples", "sample", images)
    with pytest.raises(ValueError, match=r"image 000030 has 24x24 pixels, not 32x32"):
        make_score(run)


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_two_processes_write_the_same_bytes():
    with Path("params.yaml").open("w") as file:
        YAML().dump(content(), file)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}

    def results_of(count: str) -> list[bytes]:
        env = environment | {"CONTRADIFF_NUM_PROCESSES": count}
        for stage in ("reference", "score"):
            subprocess.run([sys.executable, "-m", f"stages.{stage}"], check=True, env=env)
        files = [*sorted((BUILD / "reference").iterdir()), Path("metrics/score.json")]
        return [path.read_bytes() for path in files]

    assert results_of("1") == results_of("2")
