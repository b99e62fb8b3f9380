"""Accuracies must equal scikit-learn's and those of plain counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from contradiff.downstream.accuracy import topk_correct, wilson_interval


@pytest.mark.parametrize("k", [1, 3, 5])
def test_topk_equals_scikit_learn(k: int):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator)
    labels = torch.randint(7, (200,), generator=generator)
    options = {"k": k, "normalize": False, "labels": range(7)}
    expected = top_k_accuracy_score(labels.numpy(), logits.numpy(), **options)
    parts = zip(logits.split(32), labels.split(32), strict=True)
    assert topk_correct(logits, labels, k) == expected
    assert sum(topk_correct(x, y, k) for x, y in parts) == expected  # over uneven batches


def test_topk_refuses_what_has_no_order():
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="NaN"):
        topk_correct(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), labels, 1)


@settings(max_examples=30)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_s_ends_are_where_the_score_test_turns(counts: tuple[int, int]):
    """Its ends solve (correct/n - p)^2 = z^2 p (1 - p) / n for p; z is the 95% normal quantile."""
    correct, total = counts
    interval = wilson_interval(correct, total)
    assert 0 <= interval[0] <= correct / total <= interval[1] <= 1
    for p in interval:
        distance = (correct / total - p) ** 2
        assert distance == pytest.approx(1.959963984540054**2 * p * (1 - p) / total, abs=1e-12)
