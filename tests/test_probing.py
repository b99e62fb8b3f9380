"""contradiff.probing against a step-for-step transcription and scikit-learn."""

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from contradiff.probing import (
    AttentiveProbe,
    LinearProbe,
    ProbeParams,
    SgdSetting,
    evaluate,
    train_attentive_probes,
    train_linear_probe,
)

SETTINGS = {
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "batch_size": 64,
    "epochs": 10,
    "warmup_epochs": 1.0,
}
PARAMS = {
    "split": "val",
    "head": "linear",
    "lrs": [],
    "weight_decays": [],
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "batch_size": 256,
    "epochs": 50,
    "warmup_epochs": 5,
}


def clusters(
    num_samples: int, *, dim: int, num_classes: int, spread: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Gaussian clusters, each feature at a scale and offset of its own."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    noise = torch.randn(num_samples, dim, generator=generator)
    scale = torch.logspace(-2, 2, dim)
    return (centres[labels] + spread * noise) * scale + 3 * scale, labels


def test_separable_features_are_learnt_whatever_their_scale():
    features, labels = clusters(1000, dim=32, num_classes=10, spread=0.3, seed=0)
    test_features, test_labels = clusters(500, dim=32, num_classes=10, spread=0.3, seed=1)
    probe = train_linear_probe(features, labels, num_classes=10, seed=0, **SETTINGS)
    result = evaluate(probe, test_features, test_labels)
    assert result.top1 > 0.99
    assert result.top5 >= result.top1
    assert result.correct == round(result.top1 * 500)
    assert result.total == 500
    assert result.interval[0] < result.top1 <= result.interval[1]


def test_as_good_as_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, labels = clusters(2000, dim=16, num_classes=6, spread=1.2, seed=0)
    test_features, test_labels = clusters(2000, dim=16, num_classes=6, spread=1.2, seed=1)
    scaler = StandardScaler().fit(features.numpy())
    peer = LogisticRegression(max_iter=300).fit(scaler.transform(features.numpy()), labels.numpy())
    expected = peer.score(scaler.transform(test_features.numpy()), test_labels.numpy())
    probe = train_linear_probe(features, labels, num_classes=6, seed=0, **SETTINGS)
    assert 0.7 < expected < 0.98  # neither trivial nor hopeless
    assert evaluate(probe, test_features, test_labels).top1 == pytest.approx(expected, abs=0.015)


def test_equals_a_transcription_with_torch_optim():
    """Table 2's recipe written out with nn.Sequential, torch.optim.SGD and LambdaLR."""
    settings = {**SETTINGS, "weight_decay": 0.01, "batch_size": 4, "epochs": 4}
    features, labels = clusters(10, dim=5, num_classes=3, spread=1.0, seed=0)
    reports: list[tuple[int, float, float]] = []
    probe = train_linear_probe(
        features,
        labels,
        num_classes=3,
        seed=7,
        on_progress=lambda epoch, row: reports.append((epoch, row["loss"], row["lr"])),
        **settings,
    )

    generator = torch.Generator().manual_seed(7)
    reference = nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
    nn.init.trunc_normal_(reference[1].weight, std=0.01, generator=generator)
    nn.init.zeros_(reference[1].bias)
    optimizer = torch.optim.SGD(
        reference.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01, foreach=False
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 9)),
    )
    for epoch in range(4):
        order = torch.randperm(10, generator=generator)
        total = 0.0
        for start, stop in ((0, 4), (4, 7), (7, 10)):
            rows = order[start:stop]
            loss = nn.functional.cross_entropy(reference(features[rows]), labels[rows])
            total += loss.item() * len(rows)
            rate = scheduler.get_last_lr()[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        assert reports[epoch] == (epoch + 1, pytest.approx(total / 10), pytest.approx(rate))

    torch.testing.assert_close(probe.linear.weight, reference[1].weight)
    torch.testing.assert_close(probe.linear.bias, reference[1].bias)
    torch.testing.assert_close(probe.norm.running_mean, reference[0].running_mean)
    torch.testing.assert_close(probe.norm.running_var, reference[0].running_var)


def test_depends_on_its_seed_alone():
    features, labels = clusters(100, dim=4, num_classes=3, spread=1.0, seed=0)
    first = train_linear_probe(features, labels, num_classes=3, seed=0, **SETTINGS)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = train_linear_probe(features, labels, num_classes=3, seed=0, **SETTINGS)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.linear.weight, again.linear.weight)
    other = train_linear_probe(features, labels, num_classes=3, seed=1, **SETTINGS)
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_half_precision_features_are_trained_on_in_single():
    features, labels = clusters(200, dim=8, num_classes=3, spread=0.2, seed=0)
    probe = train_linear_probe(features.half(), labels, num_classes=3, seed=0, **SETTINGS)
    assert probe.linear.weight.dtype == torch.float32
    assert evaluate(probe, features.half(), labels).top1 > 0.99


class MeanOfCleanest(nn.Module):
    """A stand-in for the tri-timestep attention: it reads only the map that it is given last."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, dim)

    def forward(self, maps: Tensor) -> Tensor:
        return self.linear(self.norm(maps[:, 2].mean((-2, -1))))


def train_attentive(
    maps: torch.Tensor,
    labels: torch.Tensor,
    *,
    head: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    **shared: Any,
) -> list[AttentiveProbe]:
    """With a single setting."""
    settings = [SgdSetting(lr, momentum, weight_decay)]
    return train_attentive_probes(
        maps, labels, attention_head=head, settings=settings, seed=0, **shared
    )


def test_attentive_probe_trains_a_copy_of_the_head():
    vectors, labels = clusters(400, dim=12, num_classes=4, spread=0.5, seed=0)
    vectors = nn.functional.batch_norm(vectors, None, None, training=True)
    maps = torch.randn(400, 3, 12, 2, 2, generator=torch.Generator().manual_seed(0))
    maps[:, 2] += vectors[:, :, None, None]
    # Three random directions do not tell four classes apart: the head itself has to learn.
    torch.manual_seed(0)
    head = MeanOfCleanest(12, 3).requires_grad_(False)
    before = copy.deepcopy(head.state_dict())

    settings = {**SETTINGS, "epochs": 30}
    [probe] = train_attentive(maps, labels, head=head, num_classes=4, **settings)

    assert isinstance(probe, AttentiveProbe)
    assert not probe.training
    # Over six seeds of the head: 0.995 to 1 with its training, 0.73 to 0.90 without.
    assert evaluate(probe, maps, labels).top1 > 0.98
    features = head(maps)
    frozen = train_linear_probe(features, labels, num_classes=4, seed=0, **settings)
    assert evaluate(frozen, features, labels).top1 < 0.93
    assert all(torch.equal(head.state_dict()[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in head.parameters())
    trained = probe.attention_head.state_dict()
    # All but the last bias, whose gradient vanishes, since the probe's BatchNorm takes it away.
    for name in ("norm.weight", "norm.bias", "linear.weight"):
        assert not torch.equal(trained[name], before[name])


def test_attentive_probe_with_an_identity_head_is_the_linear_probe():
    class Flat(nn.Module):
        """Passes its input on, times a parameter that no gradient reaches."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, maps: Tensor) -> Tensor:
            return maps.flatten(1)

    maps = torch.randn(90, 3, 2, 2, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(90) % 3
    [attentive] = train_attentive(maps, labels, head=Flat(), num_classes=3, **SETTINGS)
    linear = train_linear_probe(maps.flatten(1), labels, num_classes=3, seed=0, **SETTINGS)
    assert torch.equal(attentive.probe.linear.weight, linear.linear.weight)


def test_evaluation_counts_every_sample_and_all_classes_if_fewer_than_five():
    probe = LinearProbe(3, 3).eval()
    with torch.no_grad():
        probe.linear.weight.copy_(torch.eye(3))
    # More than one evaluation batch, and no multiple of it.
    labels = torch.arange(2500) % 3
    features = nn.functional.one_hot((labels + (torch.arange(2500) < 100)) % 3, 3).float()
    result = evaluate(probe, features, labels)
    assert (result.correct, result.total) == (2400, 2500)
    assert result.top1 == pytest.approx(0.96)
    assert result.top5 == 1.0


def test_single_samples_and_no_samples_are_refused():
    features, labels = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    settings = {**SETTINGS, "batch_size": 2}
    with pytest.raises(ValueError, match=r"5 samples in batches of 2.*raise batch_size"):
        train_linear_probe(features, labels, num_classes=2, seed=0, **settings)
    with pytest.raises(ValueError, match=r"probe\.split"):
        evaluate(LinearProbe(3, 2), features[:0], labels[:0])


def test_params():
    assert ProbeParams.model_validate(PARAMS).batch_size == 256
    with pytest.raises(ValidationError, match=r"probe\.warmup_epochs is 50"):
        ProbeParams.model_validate({**PARAMS, "warmup_epochs": 50})
