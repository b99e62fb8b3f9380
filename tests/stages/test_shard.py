"""stages.shard: a whole run, killed and resumed, and what it says of irregular images."""

from stages.runtime.run import Run, RuntimeParams

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from contradiff import files as disk
from contradiff.config import read_params
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex, read_images
from contradiff.sources.imagenet import scan_images
from stages import shard
from tests.sources.imagenet_layouts import WNIDS, make_photos, write_parquet

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("n01", "n02")


def encoded(number: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    values = np.random.default_rng(number).integers(256, size=(12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def project(workplace: Path) -> Path:
    """Fourteen training images of two classes, four for validation, and their manifest."""
    for number in range(18):
        split, class_id = "train" if number < 14 else "val", CLASSES[number % 2]
        path = workplace / f"raw/{split}/{class_id}/{class_id}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    list_images(workplace)
    return workplace


def list_images(project: Path) -> None:
    manifest = project / "build/manifest/images.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    images = scan_images(project / "raw", layout="auto")
    manifest.write_text(json.dumps(images.manifest(project=project)))


def content_with(**changes: dict[str, Any]) -> dict[str, Any]:
    content = read_params(ROOT / "presets/tiny.yaml")
    content["shard"] |= {"samples_per_shard": 4, "compression": "none"}
    for section, values in changes.items():
        content[section] |= values
    return content


def run_stage(project: Path, **changes: dict[str, Any]) -> ShardIndex[ImageInfo]:
    content = content_with(**changes)
    params = {name: content[name] for name in shard.Params.model_fields}
    runtime = RuntimeParams.model_validate(content["runtime"])
    shard.main(shard.Params.model_validate(params), Run("shard", project, runtime))
    return ShardIndex.read(Path("build/shards"), ImageInfo)


def test_shards_hold_the_files_own_bytes(project: Path, capsys: pytest.CaptureFixture[str]):
    irregular = {"n01/n01_0": encoded(0, "PNG"), "n02/n02_1": encoded(1, mode="CMYK")}
    for name, content in irregular.items():
        (project / f"raw/train/{name}.JPEG").write_bytes(content)
    list_images(project)
    index = run_stage(project)
    assert [one.num_samples for one in index.shards("train")] == [4, 4, 4, 2]
    assert index.info.class_counts == {"train": [7, 7], "val": [2, 2]}
    assert index.info.irregularities == {"train": {"cmyk": 1, "png_named_jpeg": 1}, "val": {}}
    for split, number in (("train", 14), ("val", 4)):
        samples = list(read_images(Path("build/shards"), split))
        assert len(samples) == number
        for sample in samples:
            path = project / "raw" / split / unquote(sample.key)
            assert (path.parent.name, path.read_bytes()) == (CLASSES[sample.label], sample.image)
    assert "train images: 1 cmyk, 1 png_named_jpeg" in capsys.readouterr().err
    assert not list((project / ".work/shard").iterdir())


def test_threshold_is_no_reason_to_begin_anew(project: Path, capsys: pytest.CaptureFixture[str]):
    (project / "raw/train/n01/n01_4.JPEG").write_bytes(encoded(4)[:200])
    list_images(project)
    with pytest.raises(ValueError, match=r"ingest\.max_quarantined: 1 of 14 "):
        run_stage(project)
    assert not Path("build/shards").exists()
    assert run_stage(project, ingest={"max_quarantined": 0.1}).num_samples("train") == 13
    told = capsys.readouterr().err
    assert "train: 1 unreadable images are left out; quarantine.json lists them" in told
    assert "shards are finished" in told


def test_too_little_space_is_told_before_the_work(project: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=rf"^{project}/\.work/shard/.*: 4.\.\d kB are to"):
        run_stage(project)
    assert not list((project / ".work/shard").glob("*/*.tar"))


DYING = """
import itertools, os, runpy, signal
from contradiff.sources import packing

check_image, numbers = packing.check_image, itertools.count(1)

def dying(*arguments, **options):
    if next(numbers) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return check_image(*arguments, **options)

packing.check_image = dying
runpy.run_module("stages.shard", run_name="__main__", alter_sys=True)
"""


def test_killed_run_goes_on_with_the_same_bytes(project: Path):
    packing = {"samples_per_shard": 3}
    expected = run_stage(project, shard=packing)
    whole = {path.name: path.read_bytes() for path in Path("build/shards").iterdir()}
    Path("params.yaml").write_text(json.dumps(content_with(shard=packing)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(project)}
    killed = subprocess.run([sys.executable, "-c", DYING], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    kept = {p.name: p.stat().st_mtime_ns for p in (project / ".work/shard").glob("*/*.tar")}
    assert sorted(kept) == ["train-00000.tar", "train-00001.tar"]
    assert run_stage(project, shard=packing) == expected
    assert {path.name: path.read_bytes() for path in Path("build/shards").iterdir()} == whole
    for name, written in kept.items():
        assert (Path("build/shards") / name).stat().st_mtime_ns == written


def test_planning_works_where_parquet_knows_only_mean_sizes(workplace: Path):
    drawn = make_photos(seed=0, num_train=5, num_val=2)
    photos = [photo._replace(content=encoded(number)) for number, photo in enumerate(drawn)]
    write_parquet(workplace / "raw", photos)
    list_images(workplace)
    run_stage(workplace)
    for split in ("train", "val"):
        samples = list(read_images(Path("build/shards"), split))
        expected = [(WNIDS.index(p.wnid), p.content) for p in photos if p.split == split]
        assert sorted((sample.label, sample.image) for sample in samples) == sorted(expected)
