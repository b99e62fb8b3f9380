"""What is averaged, and how differences are tested."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from contradiff.studies.comparison import compare, paired_difference, spread
from contradiff.studies.store import Record, Store
from contradiff.studies.study import Study

STUDY = Study.model_validate(
    {
        "question": "?",
        "paper": "",
        "differences": [],
        "seeds": [0, 1, 2],
        "targets": [],
        "fixed": {},
        "columns": {"fid": {"title": "FID", "key": "score.fid", "format": ".2f", "better": "down"}},
        "rows": [
            {"title": title, "set": {"w": weight}}
            for weight, title in enumerate(("zero", "one", "two"))
        ],
        "baseline": "zero",
        "curve": [],
        "bubble": None,
        "samples": False,
    }
)
BASES = {
    "zero": {"lr": 0.1, "other": 3},
    "zero, other lr": {"lr": 0.2, "other": 3},
    "default": {"lr": 0.1, "other": 3.0},
}


def record(weight: int, seed: int, **changes: Any) -> Record:
    facts = {"score.reference_sha256": f"r{seed}", "score.extractor": "c"}
    content = {
        "changes": {"w": float(weight)},
        "seed": seed,
        "digest": f"{weight} {seed}",
        "base": "zero",
        "code": "new",
        "revision": "",
        "experiment": f"{weight} {seed}",
        "time": seed,
        "seconds": {},
        "curve": {},
        "metrics": facts | {"score.fid": 10.0 * weight + seed} | changes.pop("metrics", {}),
    }
    return Record.model_validate(content | changes)


def test_t_intervals_are_scipys():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 5))
    found = paired_difference(dict(enumerate(one)), dict(enumerate(other)) | {9: 1.0})
    assert found is not None
    assert found.interval is not None
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx((one - other).mean())
    assert found.number == 5
    assert paired_difference({0: 2.0}, {0: 0.5, 1: 1.0}) == paired_difference({0: 1.5}, {0: 0.0})
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_an_interval_decides():
    assert paired_difference({0: 1.0, 1: 1.1}, {0: 0.0, 1: 0.1}).excludes_zero  # type: ignore[union-attr]
    assert not paired_difference({0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.1}).excludes_zero  # type: ignore[union-attr]


def test_spreads_are_of_samples():
    found = spread({0: 1.0, 1: 2.0, 2: 6.0})
    assert found is not None
    assert (found.mean, found.number) == (3.0, 3)
    assert found.std == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert spread({}) is None


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"code": "old"}, "other code"),
        ({"base": "zero, other lr"}, "other parameters"),
        ({"metrics": {"score.extractor": "inception"}}, "other facts"),
        ({"metrics": {"score.reference_sha256": "x"}}, "other reference images or extractor"),
        ({"base": "default"}, None),
    ],
)
def test_odd_records_are_in_no_average(odd: dict[str, Any], why: str | None):
    points = [(weight, seed) for seed in (1, 0, 2) for weight in (0, 1, 2)]
    records = [record(*point, **(odd if point == (1, 2) else {})) for point in points]
    found = compare(STUDY, Store(params=BASES, records=records))
    zero, one, _ = STUDY.own_rows
    assert found.values(zero, "fid") == {0: 0.0, 1: 1.0, 2: 2.0}
    expected = {0: 10.0, 1: 11.0} | ({} if why else {2: 12.0})
    assert found.values(one, "fid") == expected
    assert [(each.experiment, text[: len(why or "")]) for each, text in found.aside] == (
        [("1 2", why)] if why else []
    )
    assert [(row.title, seeds) for row, seeds in found.missing] == ([("one", [2])] if why else [])
