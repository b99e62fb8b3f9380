"""Every rule about numbers of images, each broken alone."""

import inspect
import re
from typing import Any

import pytest

from contradiff.config import parse
from contradiff.sources import counts
from contradiff.sources.counts import CountParams, count_faults, transfer_faults
from contradiff.sources.listing import ImageFile
from tests.settings import TINY

SHOTS = {0: 30, 1: 25, 2: 40}


def found(changes: dict[str, Any], *, sizes: dict[str, int], num_empty: int = 0) -> dict[str, str]:
    """Return key => text. `sizes` has the numbers of "train" and "val" images, and of "classes"."""
    content = {name: dict(TINY[name]) for name in TINY if isinstance(TINY[name], dict)}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    params = parse(CountParams, content, source="params.yaml")
    splits = {
        split: tuple(
            ImageFile(
                f"{split}/{n % sizes['classes']}/{n}.png", n % sizes["classes"], n >= num_empty
            )
            for n in range(sizes[split])
        )
        for split in ("train", "val")
    }
    few = dict(list(SHOTS.items())[: sizes["classes"]])
    return dict([*count_faults(params, splits), *transfer_faults(params, few)])


SIZES = {"train": 4000, "val": 1000, "classes": 12}
FEW = {"train": 4000, "val": 60, "classes": 12}
CASES: list[tuple[dict[str, Any], dict[str, int], str, str]] = [
    ({"pretrain.batch_size": 4001}, SIZES, "pretrain.batch_size", "4001 is more than the 4000 tr"),
    (
        {"class_condition.epochs": 1, "class_condition.batch_size": 4001},
        SIZES,
        "class_condition.batch_size",
        "4001 is more than the 4000",
    ),
    ({"extractor.batch_size": 4001}, SIZES, "extractor.batch_size", "4001 is more than the 4000"),
    ({}, FEW | {"val": 400}, "score.kid_subset_size", "500 is more than the 400 images of ref"),
    ({"score.kid_subset_size": 50}, FEW, "reference.split", "FID needs 64 images of split val"),
    (
        {"extractor.kind": "inception"},
        SIZES,
        "reference.split",
        "FID needs 2048 images of split val, as many as the extractor has features, but .* 1000",
    ),
    (
        {"extractor.width": 2, "score.kid_subset_size": 3, "reference.split": "train"},
        SIZES | {"val": 3},
        "data.root",
        "3 validation images are too few",
    ),
    (
        {"pretrain.batch_size": 5, "extractor.batch_size": 5, "probe.split": "dev"},
        SIZES | {"train": 5},
        "probe.split",
        "0 of 5 training images are in the dev split; use more images, or set it to val",
    ),
    (
        {"pretrain.batch_size": 5, "extractor.batch_size": 5},
        SIZES | {"train": 5},
        "probe.cs",
        "C is chosen on held-out images, but 0 of 5",
    ),
    (
        {"transfer.cs": [], "transfer.shots": ["full"]},
        SIZES | {"classes": 1},
        "probe.cs",
        "logistic regression needs two classes, but data.root has one",
    ),
    ({"probe.batch_size": 2}, SIZES | {"train": 4001}, "probe.batch_size", "4001 .* of 2 leave"),
    ({"transfer.shots": [3, 26]}, SIZES, "transfer.shots", "26 is too large: class 1 has only 25"),
    (
        {"transfer.shots": [1, "full"], "transfer.batch_size": 2},
        SIZES,
        "transfer.batch_size",
        r"3 training images in batches of 2 leave .*raise it \(transfer.shots: 1\)|95 training",
    ),
    (
        {"probe.cs": []},
        SIZES | {"classes": 1},
        "transfer.cs",
        "logistic regression needs two classes, but transfer_data.root has one",
    ),
]


@pytest.mark.parametrize(("changes", "sizes", "key", "text"), CASES)
def test_each_rule_speaks_alone(
    changes: dict[str, Any], sizes: dict[str, int], key: str, text: str
):
    assert found({}, sizes=SIZES) == {}
    faults = found(changes, sizes=sizes)
    assert list(faults) == [key]
    assert re.match(text, faults[key])


def test_empty_files_are_counted_against_the_quarantine():
    assert found({"ingest.max_quarantined": 0.01}, sizes=SIZES, num_empty=10) == {}
    faults = found({"ingest.max_quarantined": 0.001}, sizes=SIZES, num_empty=10)
    assert list(faults) == ["ingest.max_quarantined"]
    assert faults["ingest.max_quarantined"].startswith(
        "10 of 1000 val images are empty files, such"
    )


def test_the_cases_are_complete():
    keys = set(re.findall(r'yield \(?\s*"([\w.]+)"', inspect.getsource(counts)))
    assert keys == {key for _, _, key, _ in CASES} | {"ingest.max_quarantined"}
