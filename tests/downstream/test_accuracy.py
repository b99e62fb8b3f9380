"""Against scikit-learn, scipy and plain counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import top_k_accuracy_score

from contradiff.downstream.accuracy import topk_correct, wilson_interval


@pytest.mark.parametrize("k", [1, 3, 5])
def test_topk_equals_scikit_learn(k: int):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)
    expected = top_k_accuracy_score(
        labels.numpy(), logits.numpy(), k=k, normalize=False, labels=range(7)
    )
    assert topk_correct(logits, labels, k) == expected


def test_counts_add_up_over_uneven_batches():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(101, 6, generator=generator)
    labels = torch.randint(6, (101,), generator=generator)
    parts = zip(logits.split(32), labels.split(32), strict=True)
    assert sum(topk_correct(x, y, 2) for x, y in parts) == topk_correct(logits, labels, 2)
    assert topk_correct(logits, labels, 6) == 101


def test_topk_refuses_what_has_no_order():
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="NaN"):
        topk_correct(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), labels, 1)
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"top-{k}"):
            topk_correct(torch.zeros(2, 2), labels, k)


@settings(max_examples=30)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts: tuple[int, int]):
    correct, total = counts
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    lower, upper = wilson_interval(correct, total)
    assert (lower, upper) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= lower <= correct / total <= upper <= 1


def test_wilson_refuses_impossible_counts():
    for correct, total in ((0, 0), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="no accuracy"):
            wilson_interval(correct, total)
