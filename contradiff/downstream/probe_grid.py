"""Train classifiers on stored features: logistic regression, and a grid of SGD probes.

probe.headline says which classifier gives the main score: logistic regression, or the SGD probe
with the setting of params.yaml, even if another setting of the grid is better. To choose a setting,
set probe.split: dev, which tests on a tenth of the training images. A choice by the validation
score would make this score too optimistic.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import Subset

from contradiff.data.subsets import is_dev, share_of_each_class
from contradiff.downstream import probe as probes
from contradiff.downstream.accuracy import Accuracy
from contradiff.downstream.logistic import LogisticScore, logistic_score, stratified_folds
from contradiff.downstream.params import TABLE_2, ProbeParams, SgdSchedule, SgdSetting
from contradiff.features.cache import CacheIndex, FeatureCache
from contradiff.features.params import FeatureSpec
from contradiff.imports import slow_import


@dataclass(frozen=True)
class GridHead:
    """One trained probe of the grid; `accuracy` is None if the training diverged."""

    feature: FeatureSpec
    setting: SgdSetting
    probe: probes.Probe
    accuracy: Accuracy | None


@dataclass(frozen=True)
class ProbeData:
    """The features and labels with which classifiers are trained and tested.

    If `split` is "val", classifiers are trained on all training images and tested on the validation
    images. If `split` is "dev", classifiers are tested on a tenth of the training images, called
    the dev split, and trained on the rest. Raises ValueError if a dev split is needed but empty.
    """

    cache: FeatureCache
    split: str
    seed: int

    @cached_property
    def dev(self) -> Bool[Tensor, " n"]:
        """For each training image, whether it belongs to the dev split."""
        dev = torch.tensor([is_dev(key) for key in self.cache.keys("train")])
        if dev.all() or not dev.any():
            user, remedy = "split: dev", "set probe.split: val"
            if self.split == "val":
                user, remedy = "cs: C is chosen on the dev split, which", "do without C: set "
                remedy += "probe.headline: sgd, probe.cs: [] and probe.few_labels: []"
            found = f"holds out {int(dev.sum())} of {len(dev)} training images, not about a tenth"
            raise ValueError(f"probe.{user} {found}; use more images, or {remedy}")
        return dev

    def sides(self, read: Callable[[str], Any]) -> tuple[Any, Any]:
        """Read the needed splits with `read`; return the training rows and the test rows."""
        if self.split == "val":
            return read("train"), read("val")
        train = read("train")
        return _rows(train, ~self.dev), _rows(train, self.dev)

    def logistic(self, name: str, cs: Sequence[float]) -> LogisticScore:
        """Test logistic regression on a cached feature.

        C is chosen on the dev split, and then all training images train the final classifier. If
        `split` is "dev", the dev split is used only for testing. C is then chosen on a tenth of the
        other training images, and all of these train the final classifier.
        """
        with slow_import():
            from sklearn.model_selection import ShuffleSplit

        train, test = self._pairs(name)
        if self.split == "dev":
            splitter = ShuffleSplit(1, test_size=0.1, random_state=self.seed)
            folds = list(splitter.split(train[0]))
        else:
            folds = [(np.flatnonzero(~self.dev), np.flatnonzero(self.dev))]
        num_classes = self.cache.index.num_classes
        return logistic_score(train, test, num_classes=num_classes, cs=cs, folds=folds)

    def few_labels(self, name: str, share: float, cs: Sequence[float]) -> LogisticScore:
        """Test logistic regression that is trained on a share of each class's training images.

        C is chosen by cross-validation among these images.
        """
        (features, labels), test = self._pairs(name)
        rows = share_of_each_class(labels.tolist(), share=share, seed=self.seed)
        train = features[rows], labels[rows]
        folds = stratified_folds(train[1], seed=self.seed)
        num_classes = self.cache.index.num_classes
        return logistic_score(train, test, num_classes=num_classes, cs=cs, folds=folds)

    def _pairs(self, name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        train, test = self.sides(lambda split: self.cache.column(split, name))
        train_labels, labels = self.sides(self.cache.labels)
        return (train, train_labels), (test, labels)


def train_grid(
    cache: FeatureCache,
    params: ProbeParams,
    seed: int,
    device: torch.device,
    on_epoch: probes.OnEpoch = lambda *_: None,
) -> list[GridHead]:
    """Train and test all SGD probes; first the main feature's with params.yaml's setting.

    Linear probes are trained on every stored feature. Attentive probes are trained only on the
    UNet's maps at features.timesteps. Raises ValueError if the first probe diverges, if there are
    no images to test on, or if attentive probes find no maps.
    """
    is_attentive, data = params.head == "attentive", ProbeData(cache, params.split, seed)
    train_labels, labels = data.sides(cache.labels)
    options: dict[str, Any] = {"settings": params.grid, "schedule": params.schedule, "seed": seed}
    options |= {"num_classes": cache.index.num_classes, "device": device, "on_epoch": on_epoch}
    grid: list[GridHead] = []
    for column in cache.index.columns[:1] if is_attentive else cache.index.columns:
        if is_attentive:
            train, judged = data.sides(cache.maps)
            options["attention_head"] = cache.attention().to(device)
        else:
            train, judged = data.sides(lambda s, name=column.name: cache.column(s, name).to(device))
        heads = probes.train_probes(train, train_labels.to(device), **options)
        for setting, head in zip(params.grid, heads, strict=True):
            is_finite = all(bool(parameter.isfinite().all()) for parameter in head.parameters())
            accuracy = probes.evaluate(head, judged, labels) if is_finite else None
            grid.append(GridHead(column, setting, head, accuracy))
    if grid[0].accuracy is None:
        raise ValueError(f"probe.lr: the probe diverges with {params.lr}; set a lower rate")
    return grid


def score_columns(
    cache: FeatureCache,
    params: ProbeParams,
    seed: int,
    device: torch.device,
    on_column: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Test each cached feature by logistic regression; return scores and widths of the features.

    The keys are the ways of pooling. If probe.cs is empty, SGD probes are tested instead.
    """
    found: dict[str, dict[str, Any]] = {}
    data = ProbeData(cache, params.split, seed)
    alone = params.model_copy(update={"head": "linear", "lrs": [], "weight_decays": []})
    for column in cache.index.columns:
        if params.cs:
            scores = data.logistic(column.name, params.cs).metrics()
        else:
            one = FeatureCache(cache.folder, cache.index.model_copy(update={"columns": (column,)}))
            [head, *_] = train_grid(one, alone, seed, device)
            assert head.accuracy is not None
            scores = head.accuracy.metrics()
        found[column.pool] = scores | {"width": cache.width(column.name)}
        on_column(1)
    return found


def _rows(inputs: Any, chosen: Bool[Tensor, " n"]) -> Any:
    rows = chosen.nonzero().squeeze(1)
    return inputs[rows] if isinstance(inputs, Tensor) else Subset(inputs, rows.tolist())


def write_grid(
    path: Path, grid: Sequence[GridHead], *, params: ProbeParams, index: CacheIndex
) -> None:
    """Write a CSV file with a row for each probe. If a probe diverged, its accuracy is empty.

    The column `name` is "configured" for the first probe, "table2" for the main feature with
    Table 2's setting, "configured+table2" if both are the same probe, and otherwise empty.
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
        # The first probe always has an accuracy, so the first row has every column.
        writer = csv.DictWriter(file, list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def probe_metrics(
    grid: Sequence[GridHead],
    *,
    params: ProbeParams,
    index: CacheIndex,
    logistic: LogisticScore | None,
    few_labels: Mapping[float, LogisticScore],
    baselines: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of metrics/probe.json, with the main score at its top level.

    The SGD probe counts as converged if its accuracy is at most 0.01 below logistic regression's.
    """
    sgd = grid[0].accuracy
    assert sgd is not None, "train_grid raises an error if the first probe diverges"
    headline = logistic.accuracy if logistic and params.headline == "logistic" else sgd
    table_2 = next(head for head in grid if head.setting == TABLE_2).accuracy
    scores = {} if table_2 is None else {"top1": table_2.top1, "top5": table_2.top5}
    near = None if logistic is None else logistic.accuracy.top1 - sgd.top1 < 0.01 + 1e-9
    return {
        **asdict(headline),
        "protocol": params.headline,
        "split": params.split,
        "head": params.head,
        "pool": index.columns[0].pool,
        "model": index.model,
        "logistic": None if logistic is None else logistic.metrics(),
        "sgd": {**sgd.metrics(), "converged": near},
        # `literal`: whether batch size, epochs and warm-up are also those of Table 2.
        "table2": {**scores, "literal": params.schedule == SgdSchedule(256, 50, 5.0)},
        "few_labels": {str(share): each.metrics() for share, each in few_labels.items()},
        "baselines": dict(baselines),
    }
