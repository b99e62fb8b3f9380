"""A cache returns what was written, and damaged or old files are refused."""

import json
from pathlib import Path

import pytest
import torch

from contradiff.features.cache import CacheIndex, FeatureCache, ModelFolders
from contradiff.features.params import FeatureSpec
from contradiff.features.write_cache import to_stored, write_table

COLUMN = FeatureSpec("mean:mid@4-2-1", (4, 2, 1), "mid", "mean")


def folders_in(folder: Path) -> ModelFolders:
    return ModelFolders(folder / "pretrain", folder / "base", folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a checkpoint, and a cache of five rows and maps in two shards."""
    checkpoint, features = tmp_path / "pretrain", tmp_path / "features"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "config.json").write_text("{}")
    features.mkdir()
    rows = torch.arange(20.0).view(5, 4).half()
    maps = torch.arange(5 * 6.0).view(5, 3, 2, 1, 1).half()
    shards, map_shards = [], []
    for number, part in enumerate((slice(0, 3), slice(3, 5))):
        keys = [f"k{i}" for i in range(5)][part]
        tensors = {COLUMN.name: rows[part], "labels": torch.arange(5)[part]}
        path = features / f"train-{number:05d}.safetensors"
        shards.append(write_table(path, tensors, keys=keys))
        file = features / f"train-{number:05d}.maps.safetensors"
        map_shards.append(write_table(file, {"maps": maps[part]}, keys=[]))
    files = {"shards": {"train": tuple(shards)}, "maps": {"train": tuple(map_shards)}}
    facts = {"model": "contradiff", "dtype": "fp16", "num_classes": 5, "head": {"width": 2}}
    facts["head_sha256"] = "0" * 64
    digest = folders_in(tmp_path).fingerprint("contradiff")
    made_with = {"seed": 0}
    index = CacheIndex(checkpoint=digest, columns=(COLUMN,), made_with=made_with, **facts, **files)
    index.write(features)
    return tmp_path


def open_in(folder: Path) -> FeatureCache:
    return FeatureCache.open(folder / "features", folders_in(folder))


def test_rows_come_back_in_order(folder: Path):
    cache = open_in(folder)
    assert torch.equal(cache.column("train", COLUMN.name), torch.arange(20.0).view(5, 4).half())
    assert cache.labels("train").tolist() == [0, 1, 2, 3, 4]
    assert cache.keys("train") == ["k0", "k1", "k2", "k3", "k4"]
    assert cache.index.columns == (COLUMN,)
    assert cache.index.maps["train"][1].num_samples == 2
    maps = cache.maps("train")
    assert len(maps) == 5
    whole = torch.arange(30.0).view(5, 3, 2, 1, 1).half()
    assert all(torch.equal(maps[row], whole[row]) for row in (4, 0, 3))


def test_damage_is_named(folder: Path):
    path = folder / "features/train-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"train-00001\.safetensors: damaged"):
        open_in(folder)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"train-00001\.safetensors: missing or truncated"):
        open_in(folder)
    path.write_bytes(content)
    (folder / "features/train-00000.maps.safetensors").unlink()
    with pytest.raises(ValueError, match=r"train-00000\.maps\.safetensors: missing"):
        open_in(folder)


def test_a_head_with_another_digest_is_refused(folder: Path):
    (folder / "features/attention.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"attention\.safetensors: damaged \(its sha256 is"):
        open_in(folder).attention()


def test_missing_and_old_indices_are_refused(folder: Path):
    path = folder / "features/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        open_in(folder)
    path.unlink()
    with pytest.raises(ValueError, match="no features; run `dvc repro features`"):
        open_in(folder)
    with pytest.raises(ValueError, match="no checkpoint; run `dvc repro pretrain`"):
        ModelFolders(folder / "nowhere", folder, folder).fingerprint("contradiff")


def test_features_that_are_not_finite_are_refused_by_the_image():
    features = torch.zeros(3, 2)
    features[1, 0] = 70_000
    with pytest.raises(ValueError, match=r"image b are too large for fp16.*features\.dtype: bf16"):
        to_stored(features, dtype="fp16", keys="abc", name="h")
    assert to_stored(features, dtype="bf16", keys="abc", name="h").dtype == torch.bfloat16
    features[2, 1] = torch.nan
    with pytest.raises(
        ValueError, match="features 'h' of image c are not finite: the training div"
    ):
        to_stored(features, dtype="bf16", keys="abc", name="h")
