"""Train classifiers on stored features: logistic regression, and a grid of SGD probes.

The main score is logistic regression's, or that of the configured SGD setting after its last epoch
(probe.headline), even if another setting of the grid is better. To choose a setting, set
probe.split: dev, which tests on a tenth of the training images. A setting chosen by its validation
score would make that score too optimistic.
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


@dataclass(frozen=True)
class ProbeData:
    """The cached images that train and test classifiers, as probe.split says.

    val: all training images train, and the validation images test. dev: nine tenths of the training
    images train and one tenth tests; the validation images are not read. Raises ValueError if the
    dev split, which `folds` also needs, has no images or all of them.
    """

    cache: FeatureCache
    split: str
    seed: int

    @cached_property
    def dev(self) -> Bool[Tensor, " n"]:
        """Which of the training images belong to the dev split."""
        dev = torch.tensor([is_dev(key) for key in self.cache.keys("train")])
        if dev.all() or not dev.any():
            user, remedy = "split: dev", "set probe.split: val"
            if self.split == "val":
                user, remedy = "cs: C is chosen on the dev split, which", "switch it off: set "
                remedy += "probe.headline: sgd, probe.cs: [] and probe.few_labels: []"
            found = f"holds out {int(dev.sum())} of {len(dev)} training images (about a tenth)"
            raise ValueError(f"probe.{user} {found}; use more images, or {remedy}")
        return dev

    def sides(self, read: Callable[[str], Any]) -> tuple[Any, Any]:
        """Apply `read` to the splits, and return the training rows and the test rows."""
        if self.split == "val":
            return read("train"), read("val")
        train = read("train")
        return _rows(train, ~self.dev), _rows(train, self.dev)

    def logistic(self, name: str, cs: Sequence[float]) -> LogisticScore:
        """Test logistic regression on a cached feature.

        The dev split chooses C. With split: dev, which tests, another tenth of the training images
        chooses C instead. Then a classifier with this C is trained on all training images.
        """
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

        Cross-validation among these images chooses C.
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
    """Train and test all SGD probes. The first has the main feature and params.yaml's setting.

    Linear probes are trained on every stored feature, one in memory at a time. Attentive probes are
    trained only on the UNet's maps at features.timesteps. Raises ValueError if the first probe
    diverges, or if a split or the maps are missing.
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
    """Test each cached feature by logistic regression; return its scores and width by its pool.

    If probe.cs is empty, the SGD probe with the configured setting is tested instead.
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
    grid: Sequence[GridHead],
    *,
    params: ProbeParams,
    index: CacheIndex,
    logistic: LogisticScore | None,
    few_labels: Mapping[float, LogisticScore],
    baselines: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of metrics/probe.json; the headline's scores are at its top level.

    The SGD probe counts as converged if it is at most one point worse than logistic regression.
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
        # `literal`: the batch size, epochs and warm-up of the whole grid are also Table 2's.
        "table2": {**scores, "literal": params.schedule == SgdSchedule(256, 50, 5.0)},
        "few_labels": {str(share): each.metrics() for share, each in few_labels.items()},
        "baselines": dict(baselines),
    }
