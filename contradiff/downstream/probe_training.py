"""Training of linear and attentive probes by SGD, many settings in one pass (Table 2).

The schedule is a linear warm-up, then half a cosine, a step at a time; the result is of the last
epoch: no epoch is selected.

*Deviation*: Table 2's weight decay of 0.05 is left to the caller, since as SGD's L2 penalty it
destroys a linear layer; params.yaml has 0. Sec. 4.2.1's "fixed learning rate" contradicts Table 2's
cosine, which is followed.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from contradiff.downstream.probing import AttentiveProbe, LinearProbe
from contradiff.features.cache import Rows
from contradiff.training.optim import SgdSchedule, SgdSetting, cosine_with_warmup

# Called with the epochs done, and the epoch's mean loss and last learning rate.
Progress: TypeAlias = Callable[[int, Mapping[str, float]], None]

_MIN_BATCH_FOR_NORM = 2


@torch.no_grad()
def train_linear_probes(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    settings: Sequence[SgdSetting],
    schedule: SgdSchedule,
    seed: int,
    on_progress: Progress | None = None,
) -> list[LinearProbe]:
    """Train one linear probe for each setting, on the device where the features lie.

    BatchNorm has no parameters, so that all heads share its output: the logits of K heads are one
    matrix product with weights (K * classes, d), and the gradient of softmax and cross-entropy is
    written out. A head that diverges leaves the others alone.

    Args:
        features: Frozen features, of any scale; half precision is taken to float32 by the batch.
        labels: Classes in [0, num_classes).
        num_classes: Number of classes.
        settings: What tells the heads apart, K of them.
        schedule: What they share.
        seed: Seed of the initial weights and of the order, the same for all heads.
        on_progress: Called after each epoch, with the loss and the rate of the first head.

    Returns:
        The probes in the settings' order, in evaluation mode.

    Raises:
        ValueError: a batch would hold a single sample.
    """
    device, num_heads = features.device, len(settings)
    generator = torch.Generator().manual_seed(seed)
    first = LinearProbe(features.shape[1], num_classes, generator=generator).to(device)
    norm = first.norm.train()
    weight = first.linear.weight.detach().repeat(num_heads, 1, 1)
    bias = first.linear.bias.detach().repeat(num_heads, 1)
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    lr, momentum, decay = (
        torch.tensor([getattr(setting, name) for setting in settings], device=device)
        for name in ("lr", "momentum", "weight_decay")
    )
    for epoch, batches in _epochs(len(features), schedule, generator):
        # Summed where it is, so that a GPU need not wait for the CPU at each step.
        loss_sum, factor = torch.zeros((), device=device), 0.0
        for numbers, factor in batches:
            rows = numbers.to(device)
            inputs = norm(features.index_select(0, rows).float())
            targets = labels.index_select(0, rows)
            logits = torch.addmm(bias.flatten(), inputs, weight.flatten(0, 1).T)
            delta, loss = _softmax_minus_target(logits.unflatten(1, (num_heads, -1)), targets)
            gradient = (delta.flatten(1).T @ inputs).unflatten(0, (num_heads, -1))
            for value, speed, slope in (
                (weight, weight_speed, gradient),
                (bias, bias_speed, delta.sum(0)),
            ):
                shape = (-1,) + (1,) * (value.ndim - 1)
                slope.addcmul_(value, decay.view(shape))
                speed.mul_(momentum.view(shape)).add_(slope)
                value.addcmul_(speed, lr.view(shape), value=-factor)
            loss_sum += loss * len(rows)
        if on_progress is not None:
            mean_loss = loss_sum.item() / len(features)
            on_progress(epoch, {"loss": mean_loss, "lr": settings[0].lr * factor})
    probes = [first.eval(), *(copy.deepcopy(first) for _ in settings[1:])]
    for probe, own_weight, own_bias in zip(probes, weight, bias, strict=True):
        probe.linear.weight.copy_(own_weight)
        probe.linear.bias.copy_(own_bias)
    return probes


def train_attentive_probes(
    maps: Float[Tensor, "n 3 channels h w"] | Rows,
    labels: Int64[Tensor, " n"],
    *,
    attention_head: nn.Module,
    num_classes: int,
    settings: Sequence[SgdSetting],
    schedule: SgdSchedule,
    seed: int,
    on_progress: Progress | None = None,
) -> list[AttentiveProbe]:
    """Train copies of the attention head, each together with a linear probe of its feature.

    For rows 2 and 3 of Table 7, where without the contrastive loss nothing else has trained the
    head; results are to be labelled `attentive`. Every batch is read once and then trains each
    copy.

    Args:
        maps: Bottleneck maps, from the noisiest to the cleanest. They may be memory-mapped
            (`Rows`): batches go to the head's device.
        labels: Classes in [0, num_classes).
        attention_head: Maps (b, 3, channels, h, w) to features (b, d); it is left as it is.
        num_classes: Number of classes.
        settings: Of SGD, one for each copy; peak learning rate and L2 penalty are of the head too.
        schedule: What they share.
        seed: Seed of the initial weights and of the order.
        on_progress: Called after each epoch with the first copy's loss and rate.

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
    optimizers = [
        torch.optim.SGD(
            probe.train().parameters(),
            lr=setting.lr,
            momentum=setting.momentum,
            weight_decay=setting.weight_decay,
        )
        for probe, setting in zip(probes, settings, strict=True)
    ]
    for epoch, batches in _epochs(len(maps), schedule, generator):
        loss_sum, factor = torch.zeros((), device=device), 0.0
        for numbers, factor in batches:
            # Maps may be half precision, and lie in host memory if they are large.
            inputs = maps.index_select(0, numbers.to(maps.device)).to(device, torch.float32)
            targets = labels.index_select(0, numbers.to(labels.device)).to(device)
            for number, (probe, optimizer) in enumerate(zip(probes, optimizers, strict=True)):
                for group in optimizer.param_groups:
                    group["lr"] = settings[number].lr * factor
                loss = nn.functional.cross_entropy(probe(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if number == 0:
                    loss_sum += loss.detach() * len(inputs)
        if on_progress is not None:
            mean_loss = loss_sum.item() / len(maps)
            on_progress(epoch, {"loss": mean_loss, "lr": settings[0].lr * factor})
    return [probe.eval() for probe in probes]


def _epochs(
    num_samples: int, schedule: SgdSchedule, generator: torch.Generator
) -> Iterator[tuple[int, Iterator[tuple[Int64[Tensor, " batch"], float]]]]:
    """Epochs, from 1, and of each the batches: rows, and the factor of the peak learning rate.

    Batches of an epoch differ in size by one at most, instead of a small last one, over which
    BatchNorm's statistics would be poor.
    """
    num_batches = math.ceil(num_samples / schedule.batch_size)
    if num_samples // max(1, num_batches) < _MIN_BATCH_FOR_NORM:
        raise ValueError(
            f"{num_samples} samples in batches of {schedule.batch_size} leave one sample alone, "
            "which BatchNorm cannot normalise: raise batch_size"
        )
    total_steps = schedule.epochs * num_batches
    warmup_steps = round(schedule.warmup_epochs * num_batches)
    factors = (
        cosine_with_warmup(step, total_steps=total_steps, warmup_steps=warmup_steps)
        for step in range(total_steps)
    )
    for epoch in range(1, schedule.epochs + 1):
        order = torch.randperm(num_samples, generator=generator)
        yield epoch, zip(order.tensor_split(num_batches), islice(factors, num_batches), strict=True)


def _softmax_minus_target(
    logits: Float[Tensor, "batch heads classes"], targets: Int64[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch heads classes"], Float[Tensor, ""]]:
    """Gradient of each head's mean cross-entropy in its logits, and the first head's loss."""
    log_probabilities = logits.log_softmax(dim=2)
    loss = nn.functional.nll_loss(log_probabilities[:, 0], targets)
    gradient = log_probabilities.exp_()
    index = targets.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    gradient.scatter_add_(2, index, gradient.new_full((1, 1, 1), -1.0).expand(index.shape))
    return gradient.div_(len(targets)), loss
