"""Benches beside other libraries: all contestants do the same work."""

from pathlib import Path

import pytest
import torch

from bench import loading, probe, sampling


def test_probe_bench_measures_probes_of_equal_accuracy(capsys: pytest.CaptureFixture[str]):
    probe.main(["600", "16", "3"])
    rows = capsys.readouterr().out.splitlines()[3:]
    assert len(rows) == 3
    worst, _, best = sorted(float(row.split()[-1].rstrip("%")) for row in rows)
    assert 60 < worst <= best < worst + 6


@pytest.mark.slow
def test_sampling_compares_equal_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All but the labelled solver make the first's images."""
    monkeypatch.chdir(Path(__file__).parents[2])
    with torch.random.fork_rng(devices=[]):
        rows = sampling.measure(tmp_path, images=2, steps=5, rounds=1)
    assert [difference for _, _, difference in rows[:3]] in (
        ["", f"{a} of 255 away", f"{b} of 255 away"] for a in (0, 1) for b in (0, 1)
    )
    assert [ratio > 0 for _, ratio, _ in rows] == [True] * 4
    assert "other work" in rows[3][0]


def test_loaders_have_the_same_work(tmp_path: Path):
    """Every image once, whoever loads it, also in workers that end with the epoch."""
    num_bytes = loading.write_files(tmp_path, 100, size=128)
    assert num_bytes == sum(path.stat().st_size for path in tmp_path.glob("tree/*/*.jpg"))
    for build in (loading.image_folder, loading.minimal_webdataset):
        batches = list(build(tmp_path, 128, 0))
        assert [batch[0].shape for batch in batches] == [(50, 3, 128, 128)] * 2
    for num_workers in (0, 2):
        batches = list(loading.ours(tmp_path, "pixels", num_workers))
        assert [batch["conditions"].shape for batch in batches] == [(1, 50, 3, 128, 128)] * 2
        assert len({row.numpy().tobytes() for b in batches for row in b["moments"][0]}) == 100
