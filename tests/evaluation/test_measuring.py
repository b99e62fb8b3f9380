"""Streaming, shards, processes, files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import Extractor, load_extractor, save_classifier
from contradiff.evaluation.inception_score import inception_score
from contradiff.evaluation.measuring import (
    FeatureSet,
    choose_kept,
    measure,
    measure_shards,
    merge_shards,
)

SIZES = (13, 1, 20, 6)


@pytest.fixture
def extractor(tmp_path: Path) -> Extractor:
    torch.manual_seed(0)
    classifier = ResidualClassifier(width=4, num_classes=3).eval()
    save_classifier(
        tmp_path / "extractor", classifier, image_size=16, val_accuracy=0.9, val_count=50
    )
    return load_extractor(tmp_path / "extractor", device=torch.device("cpu"))


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(SIZES), 3, 16, 16)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def measure_all(
    images: Tensor, extractor: Extractor, work: Path, *, num_processes: int, num_kept: int = 9
) -> FeatureSet:
    """As the stages do it, one process after the other, the last first."""
    shards = [(len(part), lambda part=part: part.split(5)) for part in images.split(SIZES)]
    for index in reversed(range(num_processes)):
        measure_shards(
            shards,
            extractor,
            work,
            reference="samples",
            num_kept=num_kept,
            splits=4,
            seed=3,
            process_index=index,
            num_processes=num_processes,
        )
    return merge_shards(work, num_shards=len(SIZES), resizers=["none"])["none"]


def test_shards_equal_one_batch(images: Tensor, extractor: Extractor, tmp_path: Path):
    found = measure_all(images, extractor, tmp_path, num_processes=1)
    features, logits = extractor(images, resizer="none")
    assert found.statistics.num_samples == len(images)
    assert found.statistics.source.reference == "samples"
    assert found.statistics.source.fingerprint == extractor.card.weights_sha256
    np.testing.assert_allclose(found.statistics.mean, features.double().mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        found.statistics.covariance, np.cov(features.T.double().numpy()), rtol=1e-4, atol=1e-9
    )
    kept = choose_kept(len(images), num_kept=9, seed=3)
    torch.testing.assert_close(found.kept, features[kept], rtol=1e-5, atol=1e-6)
    expected = inception_score(logits.double().softmax(1), splits=4)
    assert found.sums is not None
    assert found.sums.score() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_the_number_of_processes_changes_no_bit(
    num_processes: int, images: Tensor, extractor: Extractor, tmp_path: Path
):
    files = []
    for name, count in (("one", 1), ("several", num_processes)):
        whole = measure_all(images, extractor, tmp_path / name, num_processes=count)
        whole.save(tmp_path / f"{name}.safetensors")
        files.append((tmp_path / f"{name}.safetensors").read_bytes())
    assert files[0] == files[1]


def test_shards_that_are_there_are_not_done_again(
    images: Tensor, extractor: Extractor, tmp_path: Path
):
    first = measure_all(images, extractor, tmp_path, num_processes=1)
    (tmp_path / "00002-none.safetensors").unlink()
    seen = []

    def batches(number: int, part: Tensor):
        seen.append(number)
        return part.split(5)

    measure_shards(
        [
            (len(part), lambda number=number, part=part: batches(number, part))
            for number, part in enumerate(images.split(SIZES))
        ],
        extractor,
        tmp_path,
        reference="samples",
        num_kept=9,
        splits=4,
        seed=3,
        process_index=0,
        num_processes=1,
        on_progress=lambda _: None,
    )
    assert seen == [2]
    again = merge_shards(tmp_path, num_shards=len(SIZES), resizers=["none"])["none"]
    assert torch.equal(again.statistics.scatter, first.statistics.scatter)


def test_merging_keeps_the_shards_order(images: Tensor, extractor: Extractor, tmp_path: Path):
    """Float sums depend on it, and so does the order of the kept features."""
    found = measure_all(images, extractor, tmp_path, num_processes=3, num_kept=100)
    features, _ = extractor(images, resizer="none")
    torch.testing.assert_close(found.kept, features, rtol=1e-5, atol=1e-6)


def test_save_and_load(images: Tensor, extractor: Extractor, tmp_path: Path):
    found = measure_all(images, extractor, tmp_path, num_processes=1)
    path = tmp_path / "folder" / "val.safetensors"
    contents = set()
    for _ in range(5):  # several entries of metadata would come in any order
        found.save(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    loaded = FeatureSet.load(path)
    assert loaded.statistics.source == found.statistics.source
    assert loaded.statistics.num_samples == len(images)
    assert torch.equal(loaded.statistics.mean, found.statistics.mean)
    assert torch.equal(loaded.statistics.covariance, found.statistics.covariance)
    assert torch.equal(loaded.kept, found.kept)
    assert loaded.sums is not None
    assert found.sums is not None
    assert loaded.sums.score() == found.sums.score()
    assert [entry.name for entry in path.parent.iterdir()] == ["val.safetensors"]
    replace(found, sums=None).save(path)
    assert FeatureSet.load(path).sums is None


def test_load_refuses_other_files(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        FeatureSet.load(path)
    save_file({"mean": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not written by"):
        FeatureSet.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        FeatureSet.load(path)


def test_kept_images_are_drawn_evenly_and_by_the_seed():
    chosen = choose_kept(1000, num_kept=100, seed=0)
    assert torch.equal(chosen, chosen.unique())
    assert len(chosen) == 100
    assert 400 < chosen.double().mean() < 600
    assert torch.equal(chosen, choose_kept(1000, num_kept=100, seed=0))
    assert not torch.equal(chosen, choose_kept(1000, num_kept=100, seed=1))
    assert torch.equal(choose_kept(5, num_kept=100, seed=0), torch.arange(5))


def test_refuses_nothing_and_nan(images: Tensor, extractor: Extractor, tmp_path: Path):
    with pytest.raises(ValueError, match="no images to score in samples"):
        measure_shards(
            [],
            extractor,
            tmp_path,
            reference="samples",
            num_kept=9,
            splits=None,
            seed=0,
            process_index=0,
            num_processes=1,
        )

    class Broken(Extractor):
        def __call__(self, images: Tensor, *, resizer: str):
            features, logits = extractor(images, resizer=resizer)
            return features.where(features > features.min(), torch.nan), logits

    with pytest.raises(ValueError, match="features of samples hold NaN"):
        measure(
            images.split(5),
            Broken(extractor.card),
            reference="samples",
            start=0,
            num_images=len(images),
            kept=torch.arange(3),
            splits=None,
        )
