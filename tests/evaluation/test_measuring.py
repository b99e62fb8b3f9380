"""Shards, processes, threads, files."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.fid import pictures
from contradiff.data.png import encode_png
from contradiff.data.shards import Shard, write_shard
from contradiff.evaluation import measuring
from contradiff.evaluation.extractors import Extractor
from contradiff.evaluation.fid import FeatureSource
from contradiff.evaluation.measuring import Measurement, choose_kept, generated_image
from contradiff.files import sha256_of
from contradiff.processes import Processes

SIZES = (13, 1, 20, 6)
Measure = Callable[..., Measurement]


@pytest.fixture
def images() -> Tensor:
    return pictures(sum(SIZES), side=16, seed=0, contrast=60.0)


@pytest.fixture
def shards(images: Tensor, tmp_path: Path) -> list[Shard]:
    records = iter({"__key__": b"%d" % i, "png": encode_png(x)} for i, x in enumerate(images))
    return [
        write_shard(tmp_path / f"{number}.tar", islice(records, size), compression="none")
        for number, size in enumerate(SIZES)
    ]


@pytest.fixture
def measure(extractor: Extractor, shards: list[Shard], tmp_path: Path) -> Measure:
    def measure(work_dir: str = "work", **changes: Any) -> Measurement:
        (tmp_path / work_dir).mkdir(exist_ok=True)
        arguments = {"load": partial(generated_image, image_size=16), "extractor": extractor}
        arguments |= {"images": "samples", "num_kept": 9, "with_logits": True, "batch_size": 5}
        arguments |= {"num_workers": 0, "seed": 3, "processes": Processes()}
        arguments |= {"on_progress": lambda _: None, "work_dir": tmp_path / work_dir} | changes
        return measuring.measure_shards(tmp_path, shards, **arguments).get("none")

    return measure


def test_shards_equal_one_batch(images: Tensor, extractor: Extractor, measure: Measure):
    found = measure()
    features, logits = extractor(images, resizer="none")
    own, fingerprint = found.statistics, extractor.card.weights_sha256
    assert own.num_samples == len(images)
    assert own.source == FeatureSource("samples", "none", "domain-classifier", fingerprint)
    np.testing.assert_allclose(own.mean, features.double().mean(0), rtol=1e-5)
    covariance = np.cov(features.T.double().numpy())
    np.testing.assert_allclose(own.covariance, covariance, rtol=1e-4, atol=1e-9)
    is_kept = choose_kept(len(images), num_kept=9, seed=3)
    torch.testing.assert_close(found.kept, features[is_kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-6)
    assert len(measure("without", with_logits=False).logits) == 0


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 2), (2, 0), (3, 2)])
def test_processes_and_threads_change_no_bit(
    num_processes: int, num_workers: int, measure: Measure, tmp_path: Path
):
    measure("one").save(tmp_path / "one.safetensors")
    barrier = threading.Barrier(num_processes).wait

    def measure_as(rank: int) -> Measurement:
        processes = Processes(rank, num_processes, barrier)
        return measure("several", num_workers=num_workers, processes=processes)

    with ThreadPoolExecutor(num_processes) as pool:  # threads stand for the processes
        found = list(pool.map(measure_as, range(num_processes)))
    assert found[1:] == [None] * (num_processes - 1)
    found[0].save(tmp_path / "several.safetensors")
    one, several = (tmp_path / f"{name}.safetensors" for name in ("one", "several"))
    assert one.read_bytes() == several.read_bytes()


def test_an_interrupted_run_goes_on_where_it_was(measure: Measure, tmp_path: Path):
    first, seen, done = measure(), [], []
    (tmp_path / "work" / "00002-none.safetensors").unlink()

    def load(record: Any) -> Tensor:
        seen.append(record["__key__"])
        return generated_image(record, image_size=16)

    again = measure(load=load, on_progress=done.append)
    assert seen == [b"%d" % i for i in range(14, 34)]
    assert (done[0], sum(done)) == (20, sum(SIZES))  # the first are those found done
    assert torch.equal(again.statistics.scatter, first.statistics.scatter)


def test_a_damaged_shard_is_refused(measure: Measure, tmp_path: Path):
    """The last byte is tar's padding: nobody but the digest sees it."""
    path = tmp_path / "1.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="its sha256 is not"):
        measure()


def test_save_and_load(measure: Measure, tmp_path: Path):
    loaded, path = measure(), tmp_path / "folder" / "val.safetensors"
    contents = set()
    for _ in range(5):  # several entries of metadata would come in any order
        loaded.save(path)
        contents.add(path.read_bytes())
        loaded = Measurement.load(path, sha256=sha256_of(path), remedy="")
    assert len(contents) == 1
    save_file({"mean": torch.zeros(2)}, tmp_path / "other")
    (tmp_path / "nonsense").write_bytes(b"nonsense")
    for name in ("other", "nonsense"):
        digest = sha256_of(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: damaged \(.*; measure again"):
            Measurement.load(tmp_path / name, sha256=digest, remedy="measure again")
    for name, fault in (("nonsense", "its sha256 is another"), ("absent", "no such file")):
        with pytest.raises(ValueError, match=f"{name}: .*{fault}"):
            Measurement.load(tmp_path / name, sha256="0" * 64, remedy="")


def test_kept_images_are_drawn_evenly_and_by_the_seed():
    chosen = choose_kept(1000, num_kept=100, seed=0)
    assert chosen.sum() == 100
    assert 400 < chosen.nonzero().double().mean() < 600
    assert not torch.equal(chosen, choose_kept(1000, num_kept=100, seed=1))
    assert choose_kept(5, num_kept=100, seed=0).all()
