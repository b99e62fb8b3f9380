"""Probes of every cached feature in every SGD setting (as in DINOv2's evaluation), and their table.

The headline is the configured setting's last epoch, whatever the grid shows. To choose from the
grid, judge with probe.split: dev, a tenth of the training images: the best of many by the
validation images would not be an honest figure of them.
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contradiff.data.subsets import is_dev
from contradiff.downstream.accuracy import Accuracy
from contradiff.downstream.probe import (
    TABLE_2,
    AttentiveProbe,
    LinearProbe,
    OnEpoch,
    ProbeParams,
    evaluate,
    train_attentive_probes,
    train_linear_probes,
)
from contradiff.features.cache import CacheIndex, FeatureCache, MappedRows
from contradiff.features.params import FeatureSpec
from contradiff.training.optim import SgdSetting

GRID_COLUMNS = (
    *("name", "model", "head", "triple", "block", "pool", "lr", "momentum", "weight_decay"),
    *("split", "total", "top1", "top5", "low", "high"),
)
"""Of build/probe/grid.csv."""


class ProbeData:
    """Train and val of a cache; or, to choose settings, nine tenths of train and the tenth."""

    def __init__(self, cache: FeatureCache, *, dev: bool) -> None:
        """Draw the line; no features are read yet.

        Raises:
            ValueError: a side is empty; names probe.split.
        """
        self.cache, self._dev = cache, dev
        held_out = torch.tensor([dev and is_dev(key) for key in cache.keys("train")])
        self._train_rows = (~held_out).nonzero().squeeze(1)
        self._dev_rows = held_out.nonzero().squeeze(1)
        if dev and not (len(self._dev_rows) and len(self._train_rows)):
            raise ValueError(
                f"probe.split: dev holds out {len(self._dev_rows)} of {len(held_out)} training "
                "images (a tenth, by their keys); use more images, or probe.split: val"
            )

    def labels(self) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " judged"]]:
        """Classes of the training and of the judged images."""
        train = self.cache.labels("train")
        judged = train[self._dev_rows] if self._dev else self.cache.labels("val")
        return train[self._train_rows], judged

    def column(self, name: str) -> tuple[Float[Tensor, "train d"], Float[Tensor, "judged d"]]:
        """One feature, in memory."""
        train = self.cache.column("train", name)
        judged = train[self._dev_rows] if self._dev else self.cache.column("val", name)
        return train[self._train_rows], judged

    def maps(self) -> tuple[MappedRows, MappedRows]:
        """The main triple's maps, memory-mapped.

        Raises:
            ValueError: the cache has none.
        """
        train = self.cache.maps("train")
        judged = train.only(self._dev_rows) if self._dev else self.cache.maps("val")
        return train.only(self._train_rows), judged


@dataclass(frozen=True)
class GridHead:
    """One head of a grid; its accuracy is None if it has diverged."""

    feature: FeatureSpec
    setting: SgdSetting
    probe: LinearProbe | AttentiveProbe
    accuracy: Accuracy | None


def train_grid(
    data: ProbeData,
    *,
    params: ProbeParams,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch = lambda *_: None,
) -> list[GridHead]:
    """Train and judge every head; the first is the headline: configured setting, main feature.

    Linear heads are of every column, one after the other, so that one column at a time is in
    memory. Attentive heads are of the main triple's maps alone.

    Raises:
        ValueError: the headline diverges, or probe.head: attentive finds no maps.
    """
    index = data.cache.index
    train_labels, labels = data.labels()
    grid: list[GridHead] = []
    if params.head == "attentive":
        train, judged = data.maps()
        head = data.cache.attention().to(device)
        probes = train_attentive_probes(
            train,
            train_labels,
            attention_head=head,
            num_classes=index.num_classes,
            settings=params.grid,
            schedule=params.schedule,
            seed=seed,
            on_epoch=on_epoch,
        )
        grid += _judged(index.columns[0], params.grid, probes, judged, labels)
    else:
        for column in index.columns:
            train, judged = (features.to(device) for features in data.column(column.name))
            probes = train_linear_probes(
                train,
                train_labels.to(device),
                num_classes=index.num_classes,
                settings=params.grid,
                schedule=params.schedule,
                seed=seed,
                on_epoch=on_epoch,
            )
            grid += _judged(column, params.grid, probes, judged, labels)
    if grid[0].accuracy is None:
        raise ValueError(f"probe.lr: the probe diverges (got {params.lr}); lower it")
    return grid


def _judged(
    feature: FeatureSpec,
    settings: Sequence[SgdSetting],
    probes: Sequence[LinearProbe | AttentiveProbe],
    inputs: Tensor | MappedRows,
    labels: Tensor,
) -> list[GridHead]:
    return [
        GridHead(
            feature,
            setting,
            probe,
            evaluate(probe, inputs, labels)
            if all(bool(parameter.isfinite().all()) for parameter in probe.parameters())
            else None,
        )
        for setting, probe in zip(settings, probes, strict=True)
    ]


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
        "table2": {**scores, "literal": params.is_table_2},
    }
