"""Rows of the promise at toy size: ours and its peer do the same work."""

from pathlib import Path

import pytest
import torch

from bench import features, frechet, loading, probe, sampling, step


def test_heads_of_a_grid_equal_heads_alone(tmp_path: Path):
    alone, sklearn = probe.rows(tmp_path, rounds=1, num_images=600, width=16)
    assert alone.is_equal
    assert alone.figure
    assert sklearn.error is not None


def test_distances_are_equal(tmp_path: Path):
    rows = list(frechet.rows(tmp_path, rounds=1, dimension=16))
    assert [row.peer for row in rows if row.is_equal] == ["pytorch-fid", "torch-fidelity"]


@pytest.mark.slow
def test_sampling_compares_equal_work(tmp_path: Path):
    """All but the labelled solver make the pipeline's images."""
    with torch.random.fork_rng(devices=[]):
        rows = list(sampling.rows(tmp_path, rounds=1, images=2, steps=5))
    assert [row.is_equal and row.figure is not None for row in rows] == [True] * 3
    assert [row.tolerance for row in rows] == [1.0, 1.0, None]
    assert "other work" in rows[2].note


@pytest.mark.slow
def test_steps_have_the_peers_losses_and_gradients(tmp_path: Path):
    with torch.random.fork_rng(devices=[]):
        rows = list(step.rows(tmp_path, rounds=1, num_images=4))
    assert [row.is_equal and row.figure is not None for row in rows] == [True] * 2


@pytest.mark.slow
def test_cached_features_train_the_same_head(tmp_path: Path):
    with torch.random.fork_rng(devices=[]):
        [row] = features.rows(tmp_path, rounds=1, num_images=80, epochs=2)
    assert row.is_equal
    assert row.figure


def test_loaders_have_the_same_work(tmp_path: Path):
    """Every image once, whoever loads it, also in workers that end with the epoch."""
    written = loading.write_files(tmp_path, 100, size=128)
    assert len(written) == len(list(tmp_path.glob("tree/*/*.jpg"))) == 100
    for build in (loading.image_folder, loading.minimal_webdataset):
        batches = list(build(tmp_path, 128, 0))
        assert [batch[0].shape for batch in batches] == [(50, 3, 128, 128)] * 2
    for num_workers in (0, 2):
        batches = list(loading.ours(tmp_path, "pixels", num_workers))
        assert [batch["conditions"].shape for batch in batches] == [(1, 50, 3, 128, 128)] * 2
        assert {row.tobytes() for b in batches for row in b["moments"][0].numpy()} == written
    assert loading.error_of_latents(tmp_path, written) == 0
    assert loading.error_of_latents(tmp_path, {b"other"}) == 1
    assert 0 < loading.error_of_crops(tmp_path, 128) < loading.CROP_TOLERANCE
