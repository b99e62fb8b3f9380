"""Probes must equal a plain transcription, scikit-learn and probes trained alone; parameters."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from contradiff.downstream.linear import LinearProbe
from contradiff.downstream.params import TABLE_2, ProbeParams, SgdParams, SgdSchedule, SgdSetting
from contradiff.downstream.probe import evaluate, train_probes
from tests.clusters import SCHEDULE, SETTING, clusters, train_one
from tests.settings import TINY

SETTINGS = [SgdSetting(0.1, 0.9, 0.0), TABLE_2, SgdSetting(0.03, 0.5, 0.001)]
SHORT = SgdSchedule(batch_size=16, epochs=6, warmup_epochs=1.0)
SHARED = {"num_classes": 4, "schedule": SHORT, "seed": 3, "device": torch.device("cpu")}
PARAMS = TINY["probe"] | {"split": "val", "head": "linear", "lr": 0.1, "weight_decay": 0.0}
PARAMS |= {"lrs": [0.3, 0.1], "weight_decays": [0.001], "momentum": 0.9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_good_as_logistic_regression_whatever_the_features_scale(dtype: torch.dtype):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, labels = clusters(2000, dim=16, num_classes=6, spread=1.2)
    test_features, test_labels = clusters(2000, dim=16, num_classes=6, spread=1.2, seed=1)
    scaler = StandardScaler().fit(features.numpy())
    peer = LogisticRegression(max_iter=300).fit(scaler.transform(features.numpy()), labels.numpy())
    expected = peer.score(scaler.transform(test_features.numpy()), test_labels.numpy())
    probe = train_one(features.to(dtype), labels, num_classes=6)
    assert 0.7 < expected < 0.98  # the task is neither trivial nor impossible
    result = evaluate(probe, test_features.to(dtype), test_labels)
    assert result.top1 == pytest.approx(expected, abs=0.015)
    assert result.interval[0] < result.top1 < result.interval[1] < result.top5


def test_equals_a_transcription_with_torch_optim():
    """Table 2's recipe written out with nn.Sequential, torch.optim.SGD and LambdaLR."""
    features, labels = clusters(10, dim=5, num_classes=3)
    reports: list[tuple[int, float, float]] = []
    options = {"setting": replace(SETTING, weight_decay=0.01), "num_classes": 3, "seed": 7}
    options["schedule"] = replace(SCHEDULE, batch_size=4, epochs=4)
    options["on_epoch"] = lambda epoch, row: reports.append((epoch, row["loss"], row["lr"]))
    probe = train_one(features, labels, **options)
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
        order, total = torch.randperm(10, generator=generator), 0.0
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
    features, labels = clusters(100, dim=4, num_classes=3)
    first = train_one(features, labels, num_classes=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = train_one(features, labels, num_classes=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.linear.weight, again.linear.weight)
    other = train_one(features, labels, num_classes=3, seed=1)
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_single_samples_are_refused():
    features, labels = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"5 samples in batches of 2.*raise batch_size"):
        train_one(features, labels, num_classes=2, schedule=replace(SCHEDULE, batch_size=2))


def test_each_head_is_the_one_trained_alone():
    features, labels = clusters(83, dim=7)  # batches of unequal size
    reports: list[float] = []

    def report(_: int, row: Any) -> None:
        reports.append(row["loss"])

    probes = train_probes(features, labels, settings=SETTINGS, on_epoch=report, **SHARED)
    test_features, test_labels = clusters(200, dim=7, seed=1)
    for probe, setting in zip(probes, SETTINGS, strict=True):
        alone = train_one(features, labels, setting=setting, on_epoch=report, **SHARED)
        assert not probe.training
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(probe.state_dict()[name], value, atol=2e-6, rtol=2e-4)
        expected = evaluate(alone, test_features, test_labels)
        assert evaluate(probe, test_features, test_labels) == expected
    # the first head's losses, in the grid and alone
    assert reports[:6] == pytest.approx(reports[6:12], rel=1e-5)
    weights = [probe.linear.weight for probe in probes]
    assert (weights[0] - weights[1]).abs().max() > 0.1


def test_a_head_that_diverges_leaves_the_others_alone():
    features, labels = clusters(60, dim=7)
    settings = [SETTINGS[0], SgdSetting(lr=1e30, momentum=0.9, weight_decay=0.9)]
    fine, diverged = train_probes(features, labels, settings=settings, **SHARED)
    assert not diverged.linear.weight.isfinite().all()
    alone = train_one(features, labels, setting=settings[0], **SHARED)
    torch.testing.assert_close(fine.linear.weight, alone.linear.weight)


def test_attentive_heads_are_trained_copies_as_if_alone_and_maps_may_lie_in_files():
    calls: list[str] = []

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 2 * 4, 5)

        def forward(self, maps: Tensor) -> Tensor:
            h = self.linear(maps.flatten(1)).tanh()
            calls.append("forward")
            h.register_hook(lambda _: calls.append("backward"))
            return h

    torch.manual_seed(0)
    head = Head().requires_grad_(False)
    before = copy.deepcopy(head.state_dict())
    features, labels = clusters(50, dim=24)
    maps = (features / features.std(dim=0)).view(50, 3, 2, 2, 2).half()
    files = ConcatDataset([maps[:20], maps[20:]])
    probes = train_probes(files, labels, attention_head=head, settings=SETTINGS, **SHARED)
    # the first call only finds the width; then each forward has its backward: one graph at a time
    assert calls[1:] == ["forward", "backward"] * (4 * 6 * len(SETTINGS))
    for probe, setting in zip(probes, SETTINGS, strict=True):
        alone = train_one(maps, labels, attention_head=head, setting=setting, **SHARED)
        for name, value in alone.state_dict().items():
            assert torch.equal(probe.state_dict()[name], value)
        assert not probe.training
        assert (probe.attention_head.linear.weight - before["linear.weight"]).abs().max() > 1e-4
    assert all(head.state_dict()[name].equal(value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_evaluation_counts_every_sample_and_all_classes_if_fewer_than_five():
    probe = LinearProbe(3, 3).eval()
    with torch.no_grad():
        probe.linear.weight.copy_(torch.eye(3))
    # The 2500 samples are more than one evaluation batch, and not a multiple of one.
    labels = torch.arange(2500) % 3
    features = nn.functional.one_hot((labels + (torch.arange(2500) < 100)) % 3, 3).float()
    result = evaluate(probe, features, labels)
    assert (result.top1, result.top5, result.total) == (2400 / 2500, 1.0, 2500)
    with pytest.raises(ValueError, match=r"probe\.split"):
        evaluate(probe, features[:0], labels[:0])


def test_grid_of_params_has_the_configured_setting_first_and_none_twice():
    pairs = (0.1, 0.0), (0.1, 0.001), (0.3, 0.0), (0.3, 0.001)
    first, *others = (SgdSetting(lr, 0.9, decay) for lr, decay in pairs)
    assert ProbeParams.model_validate(PARAMS).grid == (first, TABLE_2, *others)
    attentive = ProbeParams.model_validate(PARAMS | {"head": "attentive", "headline": "sgd"})
    assert attentive.grid == (SgdSetting(0.1, 0.9, 0.0), TABLE_2)
    literal = PARAMS | {"lr": 0.01, "weight_decay": 0.05, "lrs": [], "weight_decays": []}
    assert ProbeParams.model_validate(literal).grid == (TABLE_2,)


def test_logistic_regression_needs_values_of_c_and_frozen_features():
    off = {"headline": "sgd", "cs": [], "few_labels": []}
    ProbeParams.model_validate(PARAMS | off)
    for changes, fault in (
        ({"headline": "logistic"}, r"probe\.headline: logistic needs values of C"),
        ({"few_labels": [0.1]}, r"probe\.few_labels: .* set probe\.few_labels to \[\]"),
    ):
        with pytest.raises(ValidationError, match=fault):
            ProbeParams.model_validate(PARAMS | off | changes)
    with pytest.raises(ValidationError, match=r"probe\.headline: .* set probe\.headline to sgd"):
        ProbeParams.model_validate(PARAMS | {"head": "attentive"})


def test_params_that_cannot_be_are_refused():
    for key, value in (("lrs", [0.0]), ("weight_decays", [-0.1]), ("warmup_epochs", 50)):
        with pytest.raises(ValidationError, match=rf"probe\.{key}"):
            ProbeParams.model_validate(PARAMS | {key: value})
    for key, value in (("cs", [0.0]), ("few_labels", [0.0]), ("few_labels", [1.1])):
        with pytest.raises(ValidationError, match=rf"{key}\.0"):
            ProbeParams.model_validate(PARAMS | {key: value})


def test_warmup_must_end_within_training():
    class Params(SgdParams):
        section = "probe"

    with pytest.raises(ValidationError, match=r"probe\.warmup_epochs is 5.*probe\.epochs"):
        Params(lr=0.1, momentum=0.9, weight_decay=0, batch_size=8, epochs=5, warmup_epochs=5)
