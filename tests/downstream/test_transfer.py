"""Against scikit-learn and hand-computed scores."""

import statistics

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from contradiff.downstream.probe_training import train_linear_probes
from contradiff.downstream.transfer import (
    TransferParams,
    TransferScores,
    compact_splits,
    draw_splits,
    ridge_classifier,
    solve_dual,
    solve_primal,
    transfer,
    transfer_metrics,
)

PARAMS = {
    "shots": [25],
    "num_splits": 3,
    "ridge": 1.0,
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "batch_size": 64,
    "epochs": 50,
    "warmup_epochs": 5,
    "finetune_epochs": 0,
    "finetune_lr": 0.001,
    "finetune_weight_decay": 0.05,
    "finetune_batch_size": 64,
}


def samples(num_samples: int, *, dim: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping clusters, each feature at a scale and offset of its own."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % num_classes
    features = centres[labels] + 1.5 * torch.randn(num_samples, dim, generator=generator)
    scale = torch.logspace(-2, 2, dim)
    return features * scale - 2 * scale, labels


def test_primal_equals_dual():
    generator = torch.Generator().manual_seed(0)
    for num_samples, dim in ((30, 8), (8, 30), (8, 8)):
        inputs = torch.randn(num_samples, dim, dtype=torch.float64, generator=generator)
        targets = torch.randn(num_samples, 3, dtype=torch.float64, generator=generator)
        primal = solve_primal(inputs, targets, ridge=0.7)
        torch.testing.assert_close(primal, solve_dual(inputs, targets, ridge=0.7))
        # The gradient of |XW - Y|^2 + ridge |W|^2 vanishes there.
        gradient = inputs.T @ (inputs @ primal - targets) + 0.7 * primal
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("num_samples", "dim"), [(60, 10), (20, 50)])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_ridge_equals_scikit_learn(num_samples: int, dim: int, penalty: float):
    from sklearn.linear_model import Ridge, RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = samples(num_samples, dim=dim, num_classes=4, seed=0)
    test_features, _ = samples(100, dim=dim, num_classes=4, seed=1)
    x, x_test = features.double().numpy(), test_features.double().numpy()
    ours = ridge_classifier(features, labels, num_classes=4, ridge=penalty)(test_features)

    targets = 2.0 * nn.functional.one_hot(labels, 4).double().numpy() - 1.0
    regression = make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(x, targets)
    torch.testing.assert_close(
        ours, torch.from_numpy(regression.predict(x_test)), atol=1e-8, rtol=0
    )
    classifier = make_pipeline(StandardScaler(), RidgeClassifier(alpha=penalty))
    classifier.fit(x, labels.numpy())
    assert ours.argmax(1).tolist() == classifier.predict(x_test).tolist()


def test_ridge_ignores_a_constant_feature_and_an_absent_class():
    features, labels = samples(40, dim=6, num_classes=4, seed=0)
    plain = ridge_classifier(features, labels, num_classes=4, ridge=1.0)
    constant = torch.cat([features, torch.full((40, 1), 0.1)], dim=1)
    more = ridge_classifier(constant, labels, num_classes=5, ridge=1.0)
    elsewhere = torch.cat([features, torch.full((40, 1), 1e6)], dim=1)
    torch.testing.assert_close(more(elsewhere)[:, :4], plain(features))
    assert more.weight[6].abs().max() == 0
    torch.testing.assert_close(more(elsewhere)[:, 4], torch.full((40,), -1.0).double())


def test_ridge_does_not_see_scale_or_offset():
    features, labels = samples(40, dim=6, num_classes=4, seed=0)
    plain = ridge_classifier(features.double(), labels, num_classes=4, ridge=1.0)
    moved = features.double() * 50 + 7
    other = ridge_classifier(moved, labels, num_classes=4, ridge=1.0)
    torch.testing.assert_close(plain(features.double()), other(moved), atol=1e-9, rtol=0)


def test_splits_and_their_compact_form():
    labels = [index % 5 for index in range(500)]
    splits = draw_splits(labels, shots=4, num_splits=3, seed=10)
    assert splits == [
        *draw_splits(labels, shots=4, num_splits=1, seed=10),
        *draw_splits(labels, shots=4, num_splits=2, seed=11),
    ]
    used, rows = compact_splits({4: splits})
    assert used == sorted(set(used))
    assert [[used[row] for row in split] for split in rows[4]] == splits


def test_splits_of_several_shots_are_nested():
    labels = [index % 5 for index in range(200)]
    splits = {
        shots: draw_splits(labels, shots=shots, num_splits=3, seed=7)
        for shots in (25, 1, 5, 10, "full")
    }
    assert splits["full"] == [list(range(200))]
    for fewer, more in ((1, 5), (5, 10), (10, 25)):
        for small, large in zip(splits[fewer], splits[more], strict=True):
            assert len(small) == 5 * fewer
            assert set(small) < set(large)
    few = {shots: splits[shots] for shots in (25, 1, 5)}
    used, rows = compact_splits(few)
    # fewer shots ask for no further features: the headline's noise and score stay as they are
    assert used == compact_splits({25: splits[25]})[0]
    for shots, group in few.items():
        assert [[used[row] for row in split] for split in rows[shots]] == group
    assert compact_splits(splits)[0] == list(range(200))


def test_transfer_scores_each_split_on_the_whole_test_set():
    features, labels = samples(400, dim=12, num_classes=4, seed=0)
    test_features, test_labels = samples(301, dim=12, num_classes=4, seed=1)
    splits = draw_splits(labels.tolist(), shots=10, num_splits=3, seed=0)
    params = TransferParams.model_validate(
        PARAMS | {"lr": 0.01, "batch_size": 16, "epochs": 20, "warmup_epochs": 1.0}
    )

    def run(features: Tensor, labels: Tensor, splits: list[list[int]]):
        return transfer(
            features,
            labels,
            test_features,
            test_labels,
            splits=splits,
            num_classes=4,
            params=params,
            seed=0,
        )

    result = run(features, labels, splits)
    assert result.total == 301
    for index, split in enumerate(splits):
        ridge = ridge_classifier(features[split], labels[split], num_classes=4, ridge=1.0)
        correct = (ridge(test_features).argmax(1) == test_labels).sum().item()
        assert result.ridge.top1[index] == pytest.approx(correct / 301)
        [probe] = train_linear_probes(
            features[split],
            labels[split],
            num_classes=4,
            settings=[params.setting],
            schedule=params.schedule,
            seed=index,
        )
        correct = (probe(test_features).argmax(1) == test_labels).sum().item()
        assert result.probe.top1[index] == pytest.approx(correct / 301)
    for scores in (result.ridge, result.probe):
        assert min(scores.top1) > 0.5
        mean = sum(scores.top1) / 3
        assert scores.mean == pytest.approx(mean)
        squares = sum((top1 - mean) ** 2 for top1 in scores.top1)
        assert scores.std == pytest.approx((squares / 2) ** 0.5)
        assert scores.std == pytest.approx(statistics.stdev(scores.top1))

    used, rows = compact_splits({10: splits})
    assert run(features[used], labels[used], rows[10]) == result
    assert run(features, labels, splits[:1]).ridge.std is None


def test_metrics_have_the_headline_first():
    def scores(mean: float, number: int) -> TransferScores:
        std = 0.5 if number > 1 else None
        return TransferScores(top1=[mean] * number, mean=mean, std=std)

    metrics = transfer_metrics(
        {
            25: {"ridge": scores(0.25, 3), "sgd": scores(0.24, 3)},
            "full": {"ridge": scores(0.9, 1), "sgd": scores(0.8, 1), "finetuned": scores(0.7, 1)},
        },
        total=99,
        source="digits",
    )
    assert metrics == {
        "ridge": {"mean": 0.25, "std": 0.5},
        "sgd": {"mean": 0.24, "std": 0.5},
        "num_splits": 3,
        "shots": 25,
        "total": 99,
        "source": "digits",
        "by_shots": {
            "25": {
                "ridge": {"mean": 0.25, "std": 0.5},
                "sgd": {"mean": 0.24, "std": 0.5},
                "num_splits": 3,
            },
            "full": {
                "ridge": {"mean": 0.9, "std": None},
                "sgd": {"mean": 0.8, "std": None},
                "finetuned": {"mean": 0.7, "std": None},
                "num_splits": 1,
            },
        },
    }


def test_params():
    for shots in ([25], [25, 1, 5, 10, "full"], ["full"]):
        assert TransferParams.model_validate({**PARAMS, "shots": shots}).shots == shots
    for shots in ([0], [], 25, ["all"], [5, 5], [True], [2.0], ["full", "full"]):
        with pytest.raises(ValidationError, match="shots"):
            TransferParams.model_validate({**PARAMS, "shots": shots})
    for key in ("num_splits", "ridge", "finetune_lr", "finetune_batch_size"):
        with pytest.raises(ValidationError, match=key):
            TransferParams.model_validate({**PARAMS, key: 0})
    with pytest.raises(ValidationError, match=r"transfer\.warmup_epochs"):
        TransferParams.model_validate({**PARAMS, "warmup_epochs": 60})
