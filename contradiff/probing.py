"""Linear and attentive probes of frozen features (Table 2, Sec. 4.2.1)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.evaluation.accuracy import topk_correct, wilson_interval
from contradiff.feature_cache import Rows
from contradiff.optim import SgdParams, cosine_with_warmup

# Called with the epochs done, and the epoch's mean loss and last learning rate.
Progress: TypeAlias = Callable[[int, Mapping[str, float]], None]

_EVALUATION_BATCH = 1024
_MIN_BATCH_FOR_NORM = 2


class ProbeParams(SgdParams):
    """How frozen features are judged on the labels."""

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
            msg = f"probe.lrs: {self.lrs} must be greater than 0"
            raise ValueError(msg)
        if min(self.weight_decays, default=0.0) < 0:
            msg = f"probe.weight_decays: {self.weight_decays} must not be negative"
            raise ValueError(msg)
        return self

    @property
    def grid(self) -> "tuple[SgdSetting, ...]":
        """Configured setting first, Table 2's somewhere, then rates x decays; none twice.

        Of attentive heads the first two alone: each is as dear as a training.
        """
        configured = SgdSetting(self.lr, self.momentum, self.weight_decay)
        if self.head == "attentive":
            return tuple(dict.fromkeys((configured, TABLE_2)))
        others = [
            SgdSetting(lr, self.momentum, weight_decay)
            for lr in (self.lr, *self.lrs)
            for weight_decay in (self.weight_decay, *self.weight_decays)
        ]
        return tuple(dict.fromkeys((configured, TABLE_2, *others)))

    @property
    def is_table_2(self) -> bool:
        """Whether batch, epochs and warm-up, which the whole grid shares, are Table 2's."""
        return (self.batch_size, self.epochs, self.warmup_epochs) == (256, 50, 5)


@dataclass(frozen=True)
class SgdSetting:
    """What tells the heads of a grid apart.

    Attributes:
        lr: Peak learning rate.
        momentum: SGD's momentum.
        weight_decay: L2 penalty of weights and biases.
    """

    lr: float
    momentum: float
    weight_decay: float


TABLE_2 = SgdSetting(lr=0.01, momentum=0.9, weight_decay=0.05)
"""Table 2 to the letter; its weight decay destroys the layer, but it is in every grid."""


class LinearProbe(nn.Module):
    """BatchNorm without affine parameters, then a linear layer: features (n, d) to logits (n, c).

    The normalisation takes the scale of the features out of the learning rate's choice (as MAE's
    linear probe). Weights start at a normal of deviation 0.01, cut at ±2, biases at 0.

    Args:
        dim: Width d of the features.
        num_classes: Number c of classes.
        generator: Source of the initial weights, on the CPU; torch's global one if None.
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
        """Logits of raw features."""
        return self.linear(self.norm(features))


class AttentiveProbe(nn.Module):
    """An attention head, trained with labels, and a linear probe of its feature.

    Args:
        attention_head: Maps bottleneck maps (n, 3, c, h, w), from the noisiest to the cleanest, to
            features (n, d).
        probe: Maps the features to logits.
    """

    def __init__(self, attention_head: nn.Module, probe: LinearProbe) -> None:
        super().__init__()
        self.attention_head = attention_head
        self.probe = probe

    def forward(self, maps: Float[Tensor, "n 3 channels h w"]) -> Float[Tensor, "n classes"]:
        """Logits of bottleneck maps."""
        return self.probe(self.attention_head(maps))


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy over a whole split.

    Attributes:
        top1: Share of samples whose label has the greatest logit, in [0, 1].
        top5: Share whose label is among the five greatest (or all, with fewer classes).
        correct: Samples counted by `top1`.
        total: Samples in the split.
        interval: Wilson's 95% interval of `top1`.
    """

    top1: float
    top5: float
    correct: int
    total: int
    interval: tuple[float, float]


def steps_per_epoch_of(num_samples: int, *, batch_size: int) -> int:
    """Batches of an epoch, which differ in size by one at most.

    Raises:
        ValueError: a batch would hold a single sample.
    """
    steps_per_epoch = math.ceil(num_samples / batch_size)
    if num_samples // max(1, steps_per_epoch) < _MIN_BATCH_FOR_NORM:
        msg = (
            f"{num_samples} samples in batches of {batch_size} leave one sample alone, which "
            f"BatchNorm cannot normalise: raise batch_size"
        )
        raise ValueError(msg)
    return steps_per_epoch


def _fit(
    probes: Sequence[nn.Module],
    inputs: Float[Tensor, "n ..."] | Rows,
    labels: Int64[Tensor, " n"],
    *,
    settings: Sequence[SgdSetting],
    batch_size: int,
    epochs: int,
    warmup_epochs: float,
    generator: torch.Generator,
    on_progress: Progress | None,
) -> None:
    """Minimise the cross-entropy by SGD, in place; leaves `probes` in evaluation mode.

    Each probe has a setting of its own; all see the same batches, each of which is read once.
    Batches of an epoch differ in size by one at most, instead of a small last one, over which
    BatchNorm's statistics would be poor.
    """
    num_samples = len(inputs)
    steps_per_epoch = steps_per_epoch_of(num_samples, batch_size=batch_size)
    device = next(probes[0].parameters()).device
    labels = labels.to(inputs.device)
    optimizers = [
        torch.optim.SGD(
            probe.parameters(),
            lr=setting.lr,
            momentum=setting.momentum,
            weight_decay=setting.weight_decay,
        )
        for probe, setting in zip(probes, settings, strict=True)
    ]
    total_steps = epochs * steps_per_epoch
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    for probe in probes:
        probe.train()
    step = 0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(num_samples, generator=generator).to(inputs.device)
        # Summed where it is, so that a GPU need not wait for the CPU at each step.
        loss_sum = torch.zeros((), device=device)
        factor = 0.0
        for rows in order.tensor_split(steps_per_epoch):
            factor = cosine_with_warmup(step, total_steps=total_steps, warmup_steps=warmup_steps)
            # Cached inputs may be half precision, and lie in host memory if they are large.
            batch = inputs.index_select(0, rows).to(device, torch.float32)
            targets = labels.index_select(0, rows).to(device)
            for number, (probe, optimizer) in enumerate(zip(probes, optimizers, strict=True)):
                for group in optimizer.param_groups:
                    group["lr"] = settings[number].lr * factor
                loss = nn.functional.cross_entropy(probe(batch), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if number == 0:
                    loss_sum += loss.detach() * len(rows)
            step += 1
        if on_progress is not None:
            rate = settings[0].lr * factor
            on_progress(epoch, {"loss": loss_sum.item() / num_samples, "lr": rate})
    for probe in probes:
        probe.eval()


def train_linear_probe(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    batch_size: int,
    epochs: int,
    warmup_epochs: float,
    seed: int,
    on_progress: Progress | None = None,
) -> LinearProbe:
    """Train a linear probe on cached features, on the device where they lie.

    Schedule: linear warm-up, then cosine, a step at a time. The result is of the last epoch: no
    epoch is selected.

    *Deviation*: Table 2's weight decay of 0.05 is left to the caller, since as SGD's L2 penalty it
    destroys the layer; params.yaml has 0. Sec. 4.2.1's "fixed learning rate" contradicts Table 2's
    cosine, which is followed.

    Args:
        features: Frozen features, of any scale.
        labels: Classes in [0, num_classes).
        num_classes: Number of classes.
        lr: Peak learning rate.
        momentum: SGD's momentum.
        weight_decay: L2 penalty of weights and biases.
        batch_size: Greatest batch.
        epochs: Passes over all the features.
        warmup_epochs: Length of the linear warm-up.
        seed: Seed of the initial weights and of the order.
        on_progress: Called after each epoch.

    Returns:
        The probe, in evaluation mode.

    Raises:
        ValueError: a batch would hold a single sample.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = LinearProbe(features.shape[1], num_classes, generator=generator).to(features.device)
    _fit(
        [probe],
        features,
        labels,
        settings=[SgdSetting(lr, momentum, weight_decay)],
        batch_size=batch_size,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        generator=generator,
        on_progress=on_progress,
    )
    return probe


def train_attentive_probes(
    maps: Float[Tensor, "n 3 channels h w"] | Rows,
    labels: Int64[Tensor, " n"],
    *,
    attention_head: nn.Module,
    num_classes: int,
    settings: Sequence[SgdSetting],
    batch_size: int,
    epochs: int,
    warmup_epochs: float,
    seed: int,
    on_progress: Progress | None = None,
) -> list[AttentiveProbe]:
    """Train copies of the attention head, each together with a linear probe of its feature.

    For rows 2 and 3 of Table 7, where without the contrastive loss nothing else has trained the
    head. As `train_linear_probe` otherwise; results are to be labelled `attentive`. Every batch is
    read once and then trains each copy.

    Args:
        maps: Bottleneck maps, from the noisiest to the cleanest. They may be memory-mapped
            (`Rows`): batches go to the head's device.
        labels: Classes in [0, num_classes).
        attention_head: Maps (b, 3, channels, h, w) to features (b, d); it is left as it is.
        num_classes: Number of classes.
        settings: Of SGD, one for each copy; peak learning rate and L2 penalty are of the head too.
        batch_size: Greatest batch.
        epochs: Passes over all the maps.
        warmup_epochs: Length of the linear warm-up.
        seed: Seed of the initial weights and of the order.
        on_progress: Called after each epoch with the first copy's loss.

    Returns:
        Head and probe by setting, in evaluation mode.

    Raises:
        ValueError: a batch would hold a single sample.
    """
    generator = torch.Generator().manual_seed(seed)
    head = copy.deepcopy(attention_head).requires_grad_(True).eval()
    device = next(head.parameters()).device
    with torch.no_grad():
        one = maps.index_select(0, torch.zeros(1, dtype=torch.int64, device=maps.device))
        dim = head(one.to(device, torch.float32)).shape[1]
    first = AttentiveProbe(head, LinearProbe(dim, num_classes, generator=generator).to(device))
    probes = [first, *(copy.deepcopy(first) for _ in settings[1:])]
    _fit(
        probes,
        maps,
        labels,
        settings=settings,
        batch_size=batch_size,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        generator=generator,
        on_progress=on_progress,
    )
    return probes


@torch.no_grad()
def evaluate(
    probe: LinearProbe | AttentiveProbe,
    features: Float[Tensor, "n ..."] | Rows,
    labels: Int64[Tensor, " n"],
) -> ProbeResult:
    """Top-1 and top-5 accuracy over every sample given, none dropped.

    Args:
        probe: From `train_linear_probe` or `train_attentive_probes`; set to evaluation mode.
        features: Features (n, d) for a linear probe, maps (n, 3, channels, h, w) for an attentive.
        labels: True classes.

    Raises:
        ValueError: there are no samples, or the probe has diverged.
    """
    if len(labels) == 0:
        msg = "no samples to evaluate the probe on: probe.split chooses none of the data"
        raise ValueError(msg)
    probe.eval()
    device = next(probe.parameters()).device
    top1 = top5 = 0
    for batch, targets in zip(
        features.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True
    ):
        logits = probe(batch.to(device, torch.float32))
        targets_there = targets.to(device)
        top1 += topk_correct(logits, targets_there, 1)
        top5 += topk_correct(logits, targets_there, min(5, logits.shape[1]))
    total = len(labels)
    return ProbeResult(
        top1=top1 / total,
        top5=top5 / total,
        correct=top1,
        total=total,
        interval=wilson_interval(top1, total),
    )
