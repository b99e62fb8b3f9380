"""Probes of many settings, trained together in one pass over the features (as DINOv2's evaluation).

Every linear head is, up to rounding, what `train_linear_probe` gives for its setting alone: same
initial weights, same batches, same normalisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from contradiff.feature_cache import Column, Rows
from contradiff.optim import cosine_with_warmup
from contradiff.probe_data import ProbeData
from contradiff.probing import (
    TABLE_2,
    AttentiveProbe,
    LinearProbe,
    ProbeParams,
    ProbeResult,
    Progress,
    SgdSetting,
    evaluate,
    steps_per_epoch_of,
    train_attentive_probes,
)


@dataclass(frozen=True)
class Judged:
    """One head of a grid, and its result, which is None if it has diverged."""

    column: Column
    setting: SgdSetting
    probe: LinearProbe | AttentiveProbe
    result: ProbeResult | None


def judge_columns(
    data: ProbeData, *, params: ProbeParams, seed: int, device: torch.device, on_progress: Progress
) -> list[Judged]:
    """Linear heads of every column and setting; first the configured setting of the main column.

    Columns come one after the other, so that one at a time is in memory.
    """
    grid: list[Judged] = []
    train_labels, labels = data.labels()
    for column in data.cache.index.columns:
        train, judged = (features.to(device) for features in data.column(column.name))
        shared = _shared(data, params, seed=seed, on_progress=on_progress)
        probes = train_linear_probes(train, train_labels.to(device), **shared)
        for setting, probe in zip(params.grid, probes, strict=True):
            grid.append(Judged(column, setting, probe, _result(probe, judged, labels)))
    return grid


def judge_maps(
    data: ProbeData,
    *,
    attention_head: nn.Module,
    params: ProbeParams,
    seed: int,
    on_progress: Progress,
) -> list[Judged]:
    """Attentive heads of the main triple's maps in every setting; first the configured one.

    Raises:
        ValueError: the cache has no maps.
    """
    (train, judged), (train_labels, labels) = data.maps(), data.labels()
    shared = _shared(data, params, seed=seed, on_progress=on_progress)
    probes = train_attentive_probes(train, train_labels, attention_head=attention_head, **shared)
    column = data.cache.index.columns[0]
    return [
        Judged(column, setting, probe, _result(probe, judged, labels))
        for setting, probe in zip(params.grid, probes, strict=True)
    ]


def grid_rows(grid: Sequence[Judged]) -> list[dict[str, object]]:
    """A grid as a table: where each head's features come from, its setting, its accuracy.

    `name` is "configured" for the headline and "table2" for the main column in Table 2's literal
    setting; a head that has diverged has no accuracy.
    """
    rows: list[dict[str, object]] = []
    for number, head in enumerate(grid):
        names = ["configured"] if number == 0 else []
        if head.column == grid[0].column and head.setting == TABLE_2:
            names.append("table2")
        row: dict[str, object] = {
            "name": "+".join(names),
            "triple": "-".join(map(str, head.column.triple or ())),
            "block": head.column.block or "",
            "pool": head.column.pool,
            "lr": head.setting.lr,
            "momentum": head.setting.momentum,
            "weight_decay": head.setting.weight_decay,
        }
        if head.result is not None:
            low, high = head.result.interval
            scores = {"top1": head.result.top1, "top5": head.result.top5, "low": low, "high": high}
            row |= {"total": head.result.total}
            row |= {name: float(f"{score:.6g}") for name, score in scores.items()}
        rows.append(row)
    return rows


def _shared(
    data: ProbeData, params: ProbeParams, *, seed: int, on_progress: Progress
) -> dict[str, Any]:
    return {
        "num_classes": data.cache.index.num_classes,
        "settings": params.grid,
        "batch_size": params.batch_size,
        "epochs": params.epochs,
        "warmup_epochs": params.warmup_epochs,
        "seed": seed,
        "on_progress": on_progress,
    }


def _result(
    probe: LinearProbe | AttentiveProbe, features: Tensor | Rows, labels: Tensor
) -> ProbeResult | None:
    """None of a head that has diverged: of a grid some may."""
    if not all(bool(parameter.isfinite().all()) for parameter in probe.parameters()):
        return None
    return evaluate(probe, features, labels)


@torch.no_grad()
def train_linear_probes(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    settings: Sequence[SgdSetting],
    batch_size: int,
    epochs: int,
    warmup_epochs: float,
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
        batch_size: Greatest batch.
        epochs: Passes over all the features.
        warmup_epochs: Length of the linear warm-up.
        seed: Seed of the initial weights and of the order, the same for all heads.
        on_progress: Called after each epoch, with the loss of the first head.

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
    steps_per_epoch = steps_per_epoch_of(len(features), batch_size=batch_size)
    total_steps, warmup_steps = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    step = 0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(features), generator=generator).to(device)
        loss_sum = torch.zeros((), device=device)
        factor = 0.0
        for rows in order.tensor_split(steps_per_epoch):
            factor = cosine_with_warmup(step, total_steps=total_steps, warmup_steps=warmup_steps)
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
            step += 1
        if on_progress is not None:
            rate = settings[0].lr * factor
            on_progress(epoch, {"loss": loss_sum.item() / len(features), "lr": rate})
    return [_probe(norm, weight[head], bias[head]) for head in range(num_heads)]


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


def _probe(norm: nn.BatchNorm1d, weight: Tensor, bias: Tensor) -> LinearProbe:
    probe = LinearProbe(weight.shape[1], weight.shape[0]).to(weight.device)
    probe.norm.load_state_dict(norm.state_dict())
    probe.linear.weight.copy_(weight)
    probe.linear.bias.copy_(bias)
    return probe.eval()
