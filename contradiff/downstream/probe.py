"""Linear and attentive classifiers ("probes") of frozen features (Table 2).

Probes with different SGD settings are trained together on the same batches, as in DINOv2's
evaluation. The learning rate changes at every step: first it rises linearly, then it falls along
half a cosine. The probe is tested after the last epoch, even if an earlier epoch was better.

*Deviation*: Table 2's weight decay of 0.05 is too strong for a linear layer trained by SGD. So the
presets set it to 0. Sec. 4.2.1 says "fixed learning rate"; this code uses Table 2's cosine.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import Dataset

from contradiff.downstream.accuracy import Accuracy, accuracy_of
from contradiff.downstream.linear import LinearProbe
from contradiff.downstream.params import SgdSchedule, SgdSetting
from contradiff.training.optim import cosine_with_warmup

OnEpoch: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Called after each epoch with the epochs done and the first probe's mean "loss" and "lr"."""

Inputs: TypeAlias = Float[Tensor, "n ..."] | Dataset[Tensor]
"""Features (n, d), or UNet maps (n, 3, c, h, w), noisiest first; a Dataset reads the maps."""

Probe: TypeAlias = LinearProbe | nn.Sequential
"""A linear probe, or an attentive probe: the modules "attention_head" and "probe" in sequence."""


def train_probes(
    inputs: Inputs,
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    settings: Sequence[SgdSetting],
    schedule: SgdSchedule,
    seed: int,
    device: torch.device,
    attention_head: nn.Module | None = None,
    on_epoch: OnEpoch = lambda *_: None,
) -> list[Probe]:
    """Train one probe for each setting; a probe that diverges does not affect the others.

    Without `attention_head`, the probes are linear, and the inputs are features. Otherwise the
    inputs are UNet maps, and each probe trains its own copy of the head. All probes start with the
    same weights and see the same batches. The probes are returned in evaluation mode.

    The batches of an epoch differ in size by one at most, because a small last batch would give
    BatchNorm poor statistics. Raises ValueError if a batch would have a single sample.
    """
    num_samples = len(labels)
    steps_per_epoch = math.ceil(num_samples / schedule.batch_size)
    if num_samples // max(1, steps_per_epoch) < 2:
        raise ValueError(
            f"{num_samples} samples in batches of {schedule.batch_size} leave a batch of one "
            "sample, which BatchNorm cannot normalise: raise batch_size"
        )
    generator = torch.Generator().manual_seed(seed)
    example = _batch(inputs, torch.tensor([0]), device)
    if attention_head is None:
        first = LinearProbe(example.shape[1], num_classes, generator=generator)
    else:
        head = copy.deepcopy(attention_head).requires_grad_(True)
        probe = LinearProbe(head(example).shape[1], num_classes, generator=generator)
        first = nn.Sequential(OrderedDict(attention_head=head, probe=probe))
    probes: list[Probe] = [first.to(device), *(copy.deepcopy(first) for _ in settings[1:])]
    for probe in probes:
        if isinstance(probe, LinearProbe) and isinstance(first, LinearProbe):
            probe.norm = first.norm
    optimizer = torch.optim.SGD(
        {"params": list(probe.train().parameters()), **asdict(setting)}
        for probe, setting in zip(probes, settings, strict=True)
    )
    total_steps = schedule.epochs * steps_per_epoch
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    step = 0
    for epoch in range(1, schedule.epochs + 1):
        loss_sum = torch.zeros((), device=device)  # a float would make a GPU wait at each step
        for rows in torch.randperm(num_samples, generator=generator).tensor_split(steps_per_epoch):
            factor = cosine_with_warmup(step, total_steps=total_steps, warmup_steps=warmup_steps)
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group["lr"] = setting.lr * factor
            optimizer.zero_grad()
            batch, targets = _batch(inputs, rows, device), labels[rows.to(labels.device)].to(device)
            if isinstance(first, LinearProbe):
                batch = first.norm(batch)  # shared by all probes
            for probe in probes:
                logits = probe.linear(batch) if isinstance(probe, LinearProbe) else probe(batch)
                loss = nn.functional.cross_entropy(logits, targets)
                loss.backward()  # here, so that memory holds one probe's graph at a time
                if probe is first:
                    loss_sum += loss.detach() * len(rows)
            optimizer.step()
            step += 1
        lr = optimizer.param_groups[0]["lr"]
        on_epoch(epoch, {"loss": loss_sum.item() / num_samples, "lr": lr})
    return [probe.eval() for probe in probes]


def _batch(inputs: Inputs, rows: Int64[Tensor, " b"], device: torch.device) -> Tensor:
    """Return some rows of the inputs as float32, from memory or from files."""
    if not isinstance(inputs, Tensor):
        return torch.stack([inputs[row] for row in rows.tolist()]).to(device, torch.float32)
    return inputs.index_select(0, rows.to(inputs.device)).to(device, torch.float32)


@torch.no_grad()
def evaluate(probe: Probe, inputs: Inputs, labels: Int64[Tensor, " n"]) -> Accuracy:
    """Test a probe on all samples. Raises ValueError for no samples, or if a logit is NaN."""
    if len(labels) == 0:
        raise ValueError("probe.split: the split has no images to test on; choose another split")
    device = next(probe.parameters()).device
    rows = torch.arange(len(labels)).split(1024)
    logits = torch.cat([probe(_batch(inputs, each, device)) for each in rows])
    return accuracy_of(logits.cpu(), labels.cpu())
