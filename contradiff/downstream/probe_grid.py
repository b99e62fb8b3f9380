"""Probes of every cached feature in every SGD setting (as in DINOv2's evaluation), and their table.

The headline is the configured setting's last epoch, whatever the grid shows. To choose from the
grid, judge with probe.split: dev, a tenth of the training images: the best of many by the
validation images would not be an honest figure of them.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Subset

from contradiff.data.subsets import is_dev
from contradiff.downstream.accuracy import Accuracy
from contradiff.downstream.probe import (
    TABLE_2,
    AttentiveProbe,
    LinearProbe,
    OnEpoch,
    ProbeParams,
    evaluate,
    train_probes,
)
from contradiff.features.cache import CacheIndex, FeatureCache
from contradiff.features.params import FeatureSpec
from contradiff.training.optim import SgdSchedule, SgdSetting

GRID_COLUMNS = (
    *("name", "model", "head", "triple", "block", "pool", "lr", "momentum", "weight_decay"),
    *("split", "total", "top1", "top5", "low", "high"),
)
"""Of build/probe/grid.csv."""


@dataclass(frozen=True)
class GridHead:
    """One head of a grid; its accuracy is None if it has diverged."""

    feature: FeatureSpec
    setting: SgdSetting
    probe: LinearProbe | AttentiveProbe
    accuracy: Accuracy | None


def train_grid(
    cache: FeatureCache,
    *,
    params: ProbeParams,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch = lambda *_: None,
) -> list[GridHead]:
    """Train and judge every head; the first is the headline: configured setting, main feature.

    Linear heads are of every stored feature, one after the other, so that one feature at a time is
    in memory. Attentive heads are of the main triple's maps alone. With probe.split: dev, the
    training images are nine tenths of train, and the judged ones the last tenth; val is not read.

    Raises:
        ValueError: the headline diverges, probe.split: dev leaves a side empty, or probe.head:
            attentive finds no maps.
    """
    index, is_attentive, is_dev_split = (
        cache.index,
        params.head == "attentive",
        params.split == "dev",
    )
    held_out = torch.tensor([is_dev_split and is_dev(key) for key in cache.keys("train")])
    train_rows, dev_rows = (rows.nonzero().squeeze(1) for rows in (~held_out, held_out))
    if is_dev_split and not (len(dev_rows) and len(train_rows)):
        raise ValueError(
            f"probe.split: dev holds out {len(dev_rows)} of {len(held_out)} training images (a "
            "tenth, by their keys); use more images, or probe.split: val"
        )

    def sides(read: Callable[[str], Any]) -> tuple[Any, Any]:
        """What `read` gives of the training and of the judged images: tensors, or maps in files."""
        train = read("train")
        judged = _rows(train, dev_rows) if is_dev_split else read("val")
        return _rows(train, train_rows), judged

    train_labels, labels = sides(cache.labels)
    grid: list[GridHead] = []
    for column in index.columns[:1] if is_attentive else index.columns:
        if is_attentive:
            train, judged = sides(cache.maps)
        else:
            train, judged = sides(lambda s, name=column.name: cache.column(s, name).to(device))
        probes = train_probes(
            train,
            train_labels.to(device),
            num_classes=index.num_classes,
            settings=params.grid,
            schedule=params.schedule,
            seed=seed,
            device=device,
            attention_head=cache.attention().to(device) if is_attentive else None,
            on_epoch=on_epoch,
        )
        for setting, probe in zip(params.grid, probes, strict=True):
            is_finite = all(bool(parameter.isfinite().all()) for parameter in probe.parameters())
            accuracy = evaluate(probe, judged, labels) if is_finite else None
            grid.append(GridHead(column, setting, probe, accuracy))
    if grid[0].accuracy is None:
        raise ValueError(f"probe.lr: the probe diverges (got {params.lr}); lower it")
    return grid


def _rows(inputs: Any, rows: Int64[Tensor, " n"]) -> Any:
    return inputs[rows] if isinstance(inputs, Tensor) else Subset(inputs, rows.tolist())


def write_grid(
    path: Path, grid: Sequence[GridHead], *, params: ProbeParams, index: CacheIndex
) -> None:
    """Write a grid as a table: where each head's features come from, its setting, its accuracy.

    `name` is "configured" for the headline and "table2" for the main feature in Table 2's literal
    setting; a head that has diverged has no accuracy.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, GRID_COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for number, head in enumerate(grid):
            names = ["configured"] if number == 0 else []
            if head.feature == grid[0].feature and head.setting == TABLE_2:
                names.append("table2")
            row: dict[str, object] = {
                "name": "+".join(names),
                "model": index.model,
                "head": params.head,
                "triple": "-".join(map(str, head.feature.triple or ())),
                "block": head.feature.block or "",
                "pool": head.feature.pool,
                **asdict(head.setting),
                "split": params.split,
            }
            if (accuracy := head.accuracy) is not None:
                low, high = accuracy.interval
                scores = {"top1": accuracy.top1, "top5": accuracy.top5, "low": low, "high": high}
                row |= {"total": accuracy.total}
                row |= {name: float(f"{score:.6g}") for name, score in scores.items()}
            writer.writerow(row)


def probe_metrics(
    grid: Sequence[GridHead], *, params: ProbeParams, index: CacheIndex
) -> dict[str, Any]:
    """What metrics/probe.json holds under `probe`: the headline, and Table 2's literal setting."""
    accuracy = grid[0].accuracy
    assert accuracy is not None
    table_2 = next(head for head in grid if head.setting == TABLE_2).accuracy
    scores = {} if table_2 is None else {"top1": table_2.top1, "top5": table_2.top5}
    return {
        **asdict(accuracy),
        "split": params.split,
        "head": params.head,
        "pool": index.columns[0].pool,
        "model": index.model,
        # Literal: the epochs, warm-up and batch, which the grid shares, are Table 2's too.
        "table2": {**scores, "literal": params.schedule == SgdSchedule(256, 50, 5.0)},
    }
