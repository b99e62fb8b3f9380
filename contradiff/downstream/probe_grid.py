"""Probes of every column of the features in every setting (as DINOv2's evaluation)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from contradiff.downstream.probe_data import ProbeData
from contradiff.downstream.probe_training import (
    Progress,
    train_attentive_probes,
    train_linear_probes,
)
from contradiff.downstream.probing import (
    TABLE_2,
    AttentiveProbe,
    LinearProbe,
    ProbeParams,
    ProbeResult,
    evaluate,
)
from contradiff.features.cache import Column, Rows
from contradiff.training.optim import SgdSetting


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
        probes = train_linear_probes(
            train,
            train_labels.to(device),
            num_classes=data.cache.index.num_classes,
            settings=params.grid,
            schedule=params.schedule,
            seed=seed,
            on_progress=on_progress,
        )
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
    probes = train_attentive_probes(
        train,
        train_labels,
        attention_head=attention_head,
        num_classes=data.cache.index.num_classes,
        settings=params.grid,
        schedule=params.schedule,
        seed=seed,
        on_progress=on_progress,
    )
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


def _result(
    probe: LinearProbe | AttentiveProbe, features: Tensor | Rows, labels: Tensor
) -> ProbeResult | None:
    """None of a head that has diverged: of a grid some may."""
    if not all(bool(parameter.isfinite().all()) for parameter in probe.parameters()):
        return None
    return evaluate(probe, features, labels)
