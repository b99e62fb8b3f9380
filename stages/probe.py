"""probe: train classifiers on stored features; report top-1 and top-5 accuracy.

The classifiers are logistic regression, and a grid of linear or attentive probes trained by SGD.
metrics/probe.json has the accuracy of each classifier. For comparison, the file also has the
accuracies of the stage `baselines`. build/probe has the trained classifiers: logistic regression,
and the SGD probe with the setting of params.yaml. Its grid.csv lists all SGD settings.
"""

from stages.runtime.run import Run, execute

from pathlib import Path
from typing import Any

from contradiff.config import Section, Seed, read_card
from contradiff.downstream.params import ProbeParams
from contradiff.downstream.probe_grid import ProbeData, probe_metrics, train_grid, write_grid
from contradiff.features.cache import FeatureCache, ModelFolders
from contradiff.method.weights import write_weights

BASE, PRETRAIN = Path("build/base"), Path("build/pretrain")
FEATURES, PROBE = Path("build/features"), Path("build/probe")
BASELINES = Path("metrics/baselines.json")


class BaselinesCard(Section):
    """Content of metrics/baselines.json."""

    baselines: dict[str, Any]


class Params(Section):
    seed: Seed
    probe: ProbeParams


def main(params: Params, run: Run) -> None:
    settings, seed, device = params.probe, params.seed, run.device
    cache = FeatureCache.open(FEATURES, ModelFolders(PRETRAIN, BASE, run.root))
    index, card = cache.index, read_card(BaselinesCard, BASELINES, stage="baselines")
    num_passes = 1 if settings.head == "attentive" else len(index.columns)
    with run.progress("train", settings.epochs * num_passes, "epoch") as advance:
        grid = train_grid(
            cache, settings, seed, device, lambda _, row: advance(1, loss=f"{row['loss']:.3f}")
        )
    logistic, few_labels, name = None, {}, index.columns[0].name
    if settings.cs and settings.head == "linear":
        data = ProbeData(cache, settings.split, seed)
        logistic = data.logistic(name, settings.cs)
        shares = settings.few_labels
        few_labels = {share: data.few_labels(name, share, settings.cs) for share in shares}
    metrics = probe_metrics(
        grid,
        params=settings,
        index=index,
        logistic=logistic,
        few_labels=few_labels,
        baselines={row: scores["top1"] for row, scores in card.baselines["rows"].items()},
    )
    how = f"{settings.headline}, {metrics['total']} {settings.split} images"
    run.log(f"top-1 {metrics['top1']:.1%} ({how})")
    for each in (*few_labels.values(), *([logistic] if logistic else [])):
        each.check(run.log, settings.section)
    if logistic and not metrics["sgd"]["converged"]:
        run.log(
            f"the SGD probe has not converged: its top-1 is {metrics['sgd']['top1']:.1%}, but "
            f"logistic regression reaches {logistic.accuracy.top1:.1%}; raise probe.epochs or "
            "probe.lr"
        )
    heads = {"head.safetensors": grid[0].probe.state_dict()}
    if logistic:
        heads["logistic.safetensors"] = logistic.probe.float().state_dict()
    facts = index.model_dump(include={"model", "checkpoint", "num_classes", "made_with"})
    facts |= {"feature": name, "head": settings.head, "headline": settings.headline}
    write_weights(PROBE, heads, facts)
    write_grid(PROBE / "grid.csv", grid, params=settings, index=index)
    run.write_json(Path("metrics/probe.json"), {"probe": metrics})


if __name__ == "__main__":
    execute(Params, main)
