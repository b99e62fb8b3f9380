"""Linear and attentive probes of frozen features, many SGD settings in one pass (Table 2).

All heads see the same batches, as in DINOv2's evaluation: they are modules side by side, each with
a parameter group of its own. The learning rate rises linearly, then falls along half a cosine, a
step at a time; the last epoch's weights are the result: no epoch is selected.

*Deviation*: params.yaml has no weight decay, since Table 2's 0.05 as SGD's L2 penalty destroys a
linear layer. Sec. 4.2.1's "fixed learning rate" contradicts Table 2's cosine, which is followed.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from contradiff.downstream.accuracy import Accuracy, topk_correct, wilson_interval
from contradiff.training.optim import SgdParams, SgdSchedule, SgdSetting, cosine_with_warmup

OnEpoch: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Told the epochs done, and the first head's mean "loss" of the epoch and last "lr"."""

Inputs: TypeAlias = Float[Tensor, "n ..."] | Dataset[Tensor]
"""Features (n, d), or n maps (3, channels, h, w), noisiest first, which may lie in files."""

TABLE_2 = SgdSetting(lr=0.01, momentum=0.9, weight_decay=0.05)
"""Table 2 to the letter; its weight decay destroys the layer, but it is in every grid."""


class ProbeParams(SgdParams):
    """Section `probe`: how frozen features are judged on the labels."""

    section: ClassVar[str] = "probe"

    split: Literal["val", "dev"] = Field(
        description="what is judged: val | dev: a held-out tenth of the training images, to choose "
        "among the grid"
    )
    head: Literal["linear", "attentive"] = Field(
        description="linear: of frozen features | attentive: an attention head learns with labels"
    )
    lrs: list[float] = Field(description="further learning rates of the grid")
    weight_decays: list[float] = Field(description="further weight decays of the grid")

    @model_validator(mode="after")
    def _grid_is_positive(self) -> "ProbeParams":
        if min(self.lrs, default=1.0) <= 0:
            raise ValueError(f"probe.lrs: {self.lrs} must be greater than 0")
        if min(self.weight_decays, default=0.0) < 0:
            raise ValueError(f"probe.weight_decays: {self.weight_decays} must not be negative")
        return self

    @property
    def grid(self) -> tuple[SgdSetting, ...]:
        """Configured setting first, then Table 2's, then rates x decays; none twice.

        An attentive grid has the first two alone: each of its heads costs as much as a training.
        """
        if self.head == "attentive":
            return tuple(dict.fromkeys((self.setting, TABLE_2)))
        others = [
            SgdSetting(lr, self.momentum, weight_decay)
            for lr in (self.lr, *self.lrs)
            for weight_decay in (self.weight_decay, *self.weight_decays)
        ]
        return tuple(dict.fromkeys((self.setting, TABLE_2, *others)))


class LinearProbe(nn.Module):
    """BatchNorm without affine parameters, as in MAE's probe, then a linear layer.

    The norm takes the scale of the features out of the learning rate's choice. Weights start at a
    normal of deviation 0.01, cut at ±2, drawn from `generator` (torch's own if None); biases at 0.
    """

    def __init__(
        self, dim: int, num_classes: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        # Without this, nn.Linear's own initialisation would draw from the global generator.
        with torch.random.fork_rng(devices=[]):
            self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Compute the logits of raw features."""
        return self.linear(self.norm(features))


Probe: TypeAlias = LinearProbe | nn.Sequential
"""A linear probe of features, or of maps: "attention_head", which learns too, then "probe"."""


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
    """Train one probe for each setting; one that diverges leaves the others alone.

    Without an attention head, probes are linear, and share one BatchNorm, which has no parameters.
    With one, the inputs are maps and each probe trains a copy of it: for rows 2 and 3 of Table 7,
    where without the contrastive loss nothing else has trained the head. All start with the same
    weights, see the same order, and come back in evaluation mode.

    Batches of an epoch differ in size by one at most, since BatchNorm's statistics over a small
    last one would be poor. A batch of a single sample is a ValueError.
    """
    num_samples = len(labels)
    steps_per_epoch = math.ceil(num_samples / schedule.batch_size)
    if num_samples // max(1, steps_per_epoch) < 2:
        raise ValueError(
            f"{num_samples} samples in batches of {schedule.batch_size} leave one sample alone, "
            "which BatchNorm cannot normalise: raise batch_size"
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
        loss_sum = torch.zeros((), device=device)  # so that a GPU need not wait at each step
        for rows in torch.randperm(num_samples, generator=generator).tensor_split(steps_per_epoch):
            factor = cosine_with_warmup(step, total_steps=total_steps, warmup_steps=warmup_steps)
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group["lr"] = setting.lr * factor
            optimizer.zero_grad()
            batch, targets = _batch(inputs, rows, device), labels[rows.to(labels.device)].to(device)
            if isinstance(first, LinearProbe):
                batch = first.norm(batch)  # once for all
            for probe in probes:
                logits = probe.linear(batch) if isinstance(probe, LinearProbe) else probe(batch)
                loss = nn.functional.cross_entropy(logits, targets)
                loss.backward()  # now, so that one probe's graph at a time is in memory
                if probe is first:
                    loss_sum += loss.detach() * len(rows)
            optimizer.step()
            step += 1
        lr = optimizer.param_groups[0]["lr"]
        on_epoch(epoch, {"loss": loss_sum.item() / num_samples, "lr": lr})
    return [probe.eval() for probe in probes]


def _batch(inputs: Inputs, rows: Int64[Tensor, " b"], device: torch.device) -> Tensor:
    """Take some rows, as float32: inputs may be half precision, and large ones lie in files."""
    if not isinstance(inputs, Tensor):
        return torch.stack([inputs[row] for row in rows.tolist()]).to(device, torch.float32)
    return inputs.index_select(0, rows.to(inputs.device)).to(device, torch.float32)


@torch.no_grad()
def evaluate(probe: Probe, inputs: Inputs, labels: Int64[Tensor, " n"]) -> Accuracy:
    """Judge a probe on every sample; ValueError if there is none, or if the probe has diverged."""
    if len(labels) == 0:
        reason = "probe.split chooses none of the data"
        raise ValueError(f"no samples to evaluate the probe on: {reason}")
    device = next(probe.parameters()).device
    top1 = top5 = 0
    for rows in torch.arange(len(labels)).split(1024):
        logits = probe(_batch(inputs, rows, device))
        targets = labels[rows.to(labels.device)].to(device)
        top1 += topk_correct(logits, targets, 1)
        top5 += topk_correct(logits, targets, min(5, logits.shape[1]))
    total = len(labels)
    return Accuracy(top1 / total, top5 / total, total, wilson_interval(top1, total))
