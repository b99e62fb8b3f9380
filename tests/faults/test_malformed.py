"""Damaged files of every kind are refused by name, or are harmless for a stated reason."""

from pathlib import Path

import pytest

from tests.faults.malformed import run


def test_a_sample_of_damaged_files(tmp_path: Path):
    results = run(tmp_path, seed=4, stride=16)  # these have files of every kind
    assert len(results.outcomes) > 50
    assert results.bad == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_all_damaged_files(tmp_path: Path, seed: int):
    results = run(tmp_path, seed=seed)
    assert len(results.outcomes) > 600
    assert results.bad == []
