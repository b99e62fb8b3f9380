"""The optimisers and the schedule agree with those of torch."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from contradiff.training.optim import build_adamw, cosine_with_warmup, is_decayed


def test_schedule_equals_torch_linear_then_cosine():
    total, warmup, lr = 60, 12, 0.3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    tiny = 1e-9  # LinearLR cannot start at zero
    linear = LinearLR(optimizer, tiny, total_iters=warmup)
    cosine = CosineAnnealingLR(optimizer, total - warmup)
    reference = SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
    for step in range(total):
        ours = lr * cosine_with_warmup(step, total_steps=total, warmup_steps=warmup)
        assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-8)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("unet.attn2.to_q.lora_A.default.weight", (4, 4), True),
        ("conditioner.to_patches.weight", (4, 3, 2, 2), True),
        ("attention.to_out.bias", (4,), False),
        ("attention.norm_in.weight", (4,), False),
        ("attention.class_token", (1, 1, 4), False),
        ("conditioner.positions", (1, 5, 4), False),
    ],
)
def test_decay_spares_biases_norms_and_tokens(name: str, shape: tuple[int, ...], expected: bool):
    assert is_decayed(name, nn.Parameter(torch.zeros(shape))) is expected


def test_adamw_takes_trainable_parameters_only_and_steps_as_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    model[0].weight.requires_grad_(False)
    reference_model = deepcopy(model)
    ours = build_adamw(model.named_parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    assert [len(group["params"]) for group in ours.param_groups] == [1, 4]
    decayed = {"params": [reference_model[2].weight], "weight_decay": 0.5}
    spared = [reference_model[0].bias, *reference_model[1].parameters(), reference_model[2].bias]
    reference = torch.optim.AdamW(
        [decayed, {"params": spared, "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.95), foreach=False
    )
    inputs = torch.randn(4, 3)
    for _ in range(3):
        for network, optimizer in ((model, ours), (reference_model, reference)):
            optimizer.zero_grad()
            network(inputs).square().mean().backward()
            optimizer.step()
    for left, right in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_adamw_refuses_a_frozen_model():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_adamw(frozen.named_parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
