"""Train a probe for each pair of a stored feature and an SGD setting, and write a table of them.

The headline score is that of the configured setting after its last epoch, even if another setting
of the grid is better. To choose a setting, set probe.split: dev, which tests on a tenth of the
training images. A setting chosen by its validation score would make that score too optimistic.
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
from contradiff.downstream import probe as probes
from contradiff.downstream.accuracy import Accuracy
from contradiff.downstream.probe import TABLE_2, ProbeParams
from contradiff.features.cache import CacheIndex, FeatureCache
from contradiff.features.params import FeatureSpec
from contradiff.training.optim import SgdSchedule, SgdSetting


@dataclass(frozen=True)
class GridHead:
    """One trained probe of the grid; `accuracy` is None if the training diverged."""

    feature: FeatureSpec
    setting: SgdSetting
    probe: probes.Probe
    accuracy: Accuracy | None


def train_grid(
    cache: FeatureCache,
    params: ProbeParams,
    seed: int,
    device: torch.device,
    on_epoch: probes.OnEpoch = lambda *_: None,
) -> list[GridHead]:
    """Train and test all probes. The first is the headline: feature and setting of params.yaml.

    Linear probes are trained on every stored feature, one in memory at a time. Attentive probes are
    trained only on the UNet's maps at features.timesteps. With probe.split: dev, nine tenths of the
    training images train and one tenth tests; val is not read. Raises ValueError if the headline
    diverges, or if a split or the maps are missing.
    """
    is_attentive, is_dev_split = params.head == "attentive", params.split == "dev"
    held_out = torch.tensor([is_dev_split and is_dev(key) for key in cache.keys("train")])
    train_rows, dev_rows = (rows.nonzero().squeeze(1) for rows in (~held_out, held_out))
    if is_dev_split and not (len(dev_rows) and len(train_rows)):
        raise ValueError(
            f"probe.split: dev holds out {len(dev_rows)} of {len(held_out)} training images (about "
            "a tenth); use more images, or set probe.split: val"
        )

    def sides(read: Callable[[str], Any]) -> tuple[Any, Any]:
        """Apply `read` to the splits, and return the training rows and the test rows."""
        train = read("train")
        judged = _rows(train, dev_rows) if is_dev_split else read("val")
        return _rows(train, train_rows), judged

    train_labels, labels = sides(cache.labels)
    options: dict[str, Any] = {"settings": params.grid, "schedule": params.schedule, "seed": seed}
    options |= {"num_classes": cache.index.num_classes, "device": device, "on_epoch": on_epoch}
    grid: list[GridHead] = []
    for column in cache.index.columns[:1] if is_attentive else cache.index.columns:
        if is_attentive:
            train, judged = sides(cache.maps)
            options["attention_head"] = cache.attention().to(device)
        else:
            train, judged = sides(lambda s, name=column.name: cache.column(s, name).to(device))
        heads = probes.train_probes(train, train_labels.to(device), **options)
        for setting, head in zip(params.grid, heads, strict=True):
            is_finite = all(bool(parameter.isfinite().all()) for parameter in head.parameters())
            accuracy = probes.evaluate(head, judged, labels) if is_finite else None
            grid.append(GridHead(column, setting, head, accuracy))
    if grid[0].accuracy is None:
        raise ValueError(f"probe.lr: the probe diverges with {params.lr}; set a lower rate")
    return grid


def _rows(inputs: Any, rows: Int64[Tensor, " n"]) -> Any:
    return inputs[rows] if isinstance(inputs, Tensor) else Subset(inputs, rows.tolist())


def write_grid(
    path: Path, grid: Sequence[GridHead], *, params: ProbeParams, index: CacheIndex
) -> None:
    """Write each probe's feature, setting and accuracy (empty if the training diverged) as CSV.

    The column `name` is "configured" for the feature and setting of params.yaml, "table2" for this
    feature with Table 2's setting, "configured+table2" if both are the same, and otherwise empty.
    """
    rows: list[dict[str, object]] = []
    for number, head in enumerate(grid):
        is_table_2 = head.feature == grid[0].feature and head.setting == TABLE_2
        row: dict[str, object] = {
            "name": "+".join(["configured"] * (number == 0) + ["table2"] * is_table_2),
            "model": index.model,
            "head": params.head,
            "triple": "-".join(map(str, head.feature.triple or ())),
            "block": head.feature.block or "",
            "pool": head.feature.pool,
            **asdict(head.setting),
            "split": params.split,
        }
        if head.accuracy is not None:
            scores = asdict(head.accuracy)
            row["total"] = scores.pop("total")
            scores["low"], scores["high"] = scores.pop("interval")
            row |= {name: float(f"{score:.6g}") for name, score in scores.items()}
        rows.append(row)
    with path.open("w", newline="") as file:
        # The headline always has an accuracy, so its row has every column.
        writer = csv.DictWriter(file, list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def probe_metrics(
    grid: Sequence[GridHead], *, params: ProbeParams, index: CacheIndex
) -> dict[str, Any]:
    """Return the content of metrics/probe.json: scores of the headline and of Table 2's setting."""
    assert grid[0].accuracy is not None, "train_grid raises an error if the headline diverges"
    table_2 = next(head for head in grid if head.setting == TABLE_2).accuracy
    scores = {} if table_2 is None else {"top1": table_2.top1, "top5": table_2.top5}
    return {
        **asdict(grid[0].accuracy),
        "split": params.split,
        "head": params.head,
        "pool": index.columns[0].pool,
        "model": index.model,
        # `literal`: the batch size, epochs and warm-up of the whole grid are also Table 2's.
        "table2": {**scores, "literal": params.schedule == SgdSchedule(256, 50, 5.0)},
    }
