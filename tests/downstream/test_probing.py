"""Its parameters, and accuracy over every sample."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from contradiff.downstream.probing import TABLE_2, LinearProbe, ProbeParams, evaluate
from contradiff.training.optim import SgdSetting

PARAMS = {
    "split": "val",
    "head": "linear",
    "lrs": [0.3, 0.1],
    "weight_decays": [0.001],
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "batch_size": 256,
    "epochs": 50,
    "warmup_epochs": 5,
}


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


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match=r"probe\.split"):
        evaluate(LinearProbe(3, 2), torch.empty(0, 3), torch.empty(0, dtype=torch.int64))


def test_warmup_must_end_within_training():
    with pytest.raises(ValidationError, match=r"probe\.warmup_epochs is 50"):
        ProbeParams.model_validate({**PARAMS, "warmup_epochs": 50})


def test_grid_of_params_has_the_configured_setting_first_and_none_twice():
    params = ProbeParams.model_validate(PARAMS)
    assert params.grid == (
        SgdSetting(0.1, 0.9, 0.0),
        TABLE_2,
        SgdSetting(0.1, 0.9, 0.001),
        SgdSetting(0.3, 0.9, 0.0),
        SgdSetting(0.3, 0.9, 0.001),
    )
    attentive = ProbeParams.model_validate(PARAMS | {"head": "attentive"})
    assert attentive.grid == (SgdSetting(0.1, 0.9, 0.0), TABLE_2)
    literal = PARAMS | {"lr": 0.01, "weight_decay": 0.05, "lrs": [], "weight_decays": []}
    assert ProbeParams.model_validate(literal).grid == (TABLE_2,)
    assert params.is_table_2
    assert not ProbeParams.model_validate(PARAMS | {"batch_size": 128}).is_table_2
    for key, value in (("lrs", [0.0]), ("weight_decays", [-0.1])):
        with pytest.raises(ValueError, match=rf"probe\.{key}"):
            ProbeParams.model_validate(PARAMS | {key: value})
