"""Logistic regression must equal scikit-learn's own pipeline, and never learn from test images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from contradiff.downstream import logistic
from contradiff.downstream.logistic import LogisticScore, logistic_score, stratified_folds
from tests.clusters import clusters

CS = [10.0, 0.001, 0.1]
TRAIN, TEST = (clusters(n, dim=9, spread=1.5, seed=n) for n in (300, 200))
FOLD = np.arange(240), np.arange(240, 300)


def score_of(train: tuple[Tensor, Tensor] = TRAIN, **changes: object) -> LogisticScore:
    options = {"num_classes": 4, "cs": CS, "folds": [FOLD]} | changes
    return logistic_score(train, TEST, **options)


def peer(features: Tensor, labels: Tensor, c: float) -> tuple[float, Tensor]:
    """Fit scikit-learn's own pipeline in float64; return its test accuracy and classifier."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=10_000, tol=1e-8))
    pipeline.fit(features.double().numpy(), labels.numpy())
    return pipeline.score(TEST[0].double().numpy(), TEST[1].numpy()), pipeline


@pytest.mark.parametrize("c", CS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_scikit_learn_s_own_pipeline(c: float, dtype: torch.dtype):
    features = TRAIN[0].to(dtype)
    found = score_of((features, TRAIN[1]), cs=[c])
    expected, _ = peer(features, TRAIN[1], c)
    assert found.accuracy.top1 == pytest.approx(expected, abs=0.006)  # one image
    assert (found.c, found.converged, found.accuracy.top5) == (c, True, 1.0)


@pytest.mark.parametrize("folds", [[FOLD], stratified_folds(TRAIN[1], seed=0)])
def test_c_is_the_best_on_held_out_samples_with_statistics_of_the_fit_alone(folds: list):
    held_out = torch.cat([torch.from_numpy(rows) for _, rows in folds])
    shifted = TRAIN[0].clone()
    shifted[held_out] += 3.0 if len(folds) == 1 else 0.0  # wrong if it entered the mean
    right = dict.fromkeys(sorted(CS), 0)
    for (fit, rows), c in ((fold, c) for fold in folds for c in CS):
        _, pipeline = peer(shifted[fit], TRAIN[1][fit], c)
        right[c] += (pipeline.predict(shifted[rows].numpy()) == TRAIN[1][rows].numpy()).sum()
    best = max(right, key=right.__getitem__)  # the first of equals, so the smallest C
    assert score_of((shifted, TRAIN[1]), folds=folds).c == best


def test_equal_scores_take_the_smallest_c_and_no_folds_the_middle():
    apart = torch.nn.functional.one_hot(TRAIN[1], 9) * 100.0
    assert score_of((apart, TRAIN[1]), cs=[3.0, 1.0, 2.0]).c == 1.0
    assert score_of(folds=[]).c == 0.1
    assert score_of(folds=[], cs=[4.0, 1.0, 3.0, 2.0]).c == 2.0


def test_a_class_without_training_samples_is_never_predicted():
    rows = TRAIN[1] != 1
    found = score_of((TRAIN[0][rows], TRAIN[1][rows]), folds=[], num_classes=7)
    absent = (TEST[1] == 1).double().mean().item()
    assert 1 - absent > found.accuracy.top1 > 0.5
    assert found.accuracy.top5 < 1  # classes 0, 2 and 3, then two of 1, 4, 5 and 6
    rows = TRAIN[1] < 2  # scikit-learn has another form for two classes
    features, labels = TRAIN[0][rows], TRAIN[1][rows]
    expected, _ = peer(features, labels, 0.1)
    two = score_of((features, labels), folds=[]).accuracy.top1
    assert two == pytest.approx(expected, abs=0.006)
    rows = TRAIN[1] == 1
    with pytest.raises(ValueError, match="at least two classes"):
        score_of((TRAIN[0][rows], TRAIN[1][rows]), folds=[])


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [1, 3]])
def test_the_saved_probe_gives_scikit_learn_s_probabilities(classes: list[int]):
    """Also in float32, as it is saved, and for two classes, which have another form."""
    rows = torch.isin(TRAIN[1], torch.tensor(classes))
    features, labels = TRAIN[0][rows], TRAIN[1][rows]
    _, pipeline = peer(features, labels, 0.1)
    expected = pipeline.predict_proba(TEST[0].double().numpy())
    probe = score_of((features, labels), cs=[0.1]).probe.float()
    found = probe(TEST[0]).softmax(dim=1)
    np.testing.assert_allclose(found[:, classes].numpy(), expected, atol=2e-3)
    assert found[:, classes].sum(dim=1).numpy() == pytest.approx(np.ones(len(found)))


def test_a_solver_that_stops_early_is_on_record(monkeypatch: pytest.MonkeyPatch):
    short = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2))
    monkeypatch.setattr(logistic, "_classifier", lambda _: short)
    found, messages = score_of(folds=[]), list[str]()
    assert found.metrics()["converged"] is False
    found.check(messages.append, "probe")
    [message] = messages
    assert message.startswith("probe.cs: logistic regression with C = 0.1 has not converged")


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 2**32 + 1))
def test_folds_are_stratified_and_as_many_as_the_smallest_class(sizes: list[int], seed: int):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    folds = stratified_folds(labels, seed=seed)
    assert len(folds) == (0 if min(sizes) == 1 else min(5, *sizes))
    if folds:
        held_out = np.concatenate([rows for _, rows in folds])
        assert sorted(held_out) == list(range(len(labels)))
    for fit, rows in folds:
        assert set(fit).isdisjoint(rows)
        for label, size in enumerate(sizes):
            share = (labels[rows] == label).sum().item()
            assert size // len(folds) <= share <= -(-size // len(folds))
