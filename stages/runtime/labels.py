"""By what MLflow's tables and charts group, filter and plot runs: tags, numbers and saved views."""

from stages.runtime.passwords import hide_passwords
from stages.runtime.work_dir import revision

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contradiff.config import flatten, read_params

STUDY_VARIABLE = "CONTRADIFF_STUDY"
AXES = {
    "lambda": "loss.lambda",
    "temperature": "loss.temperature",
    "rank": "lora.rank",
    "epochs": "pretrain.epochs",
    "guidance": "generate.guidance",
    "seed": "seed",
}
"""Metric in MLflow => parameter. MLflow keeps parameters as text, which no chart can plot."""
SCORES = (
    *("probe.top1", "transfer.top1.mean", "score.fid"),
    "separability.denoising_error.contradiff",
)
"""Metrics in the saved views: columns of the table, and charts."""


def flatten_params(content: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters for MLflow: dotted keys and values as text, without section `runtime`."""
    return {
        key: hide_passwords(value if isinstance(value, str) else json.dumps(value))
        for key, value in flatten({key: content[key] for key in content if key != "runtime"})
    }


def axes(params: Mapping[str, Any]) -> dict[str, float]:
    """Return the parameters that charts plot scores against, as numbers."""
    flat = dict(flatten(params))
    return {name: float(flat[key]) for name, key in AXES.items() if key in flat}


def labels(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a run: study, preset, what differs from the preset, and the commit."""
    preset, changes = nearest_preset(flatten_params(params))
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or revision() or ""
    tags = {"preset": preset, "changes": " ".join(f"{k}={v}" for k, v in changes.items())}
    tags |= {"revision": commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")}
    if study := study_of(os.environ.get("DVC_EXP_NAME", "")):
        tags["study"] = study
    return tags


def study_of(experiment: str) -> str | None:
    """Return the study of a DVC experiment: the name of a file in studies/, if a hyphen follows it.

    If the experiment's name begins with no study, the variable CONTRADIFF_STUDY decides.
    """
    names = sorted((path.stem for path in Path("studies").glob("*.yaml")), key=len, reverse=True)
    found = (name for name in names if experiment.startswith(f"{name}-"))
    return next(found, None) or os.environ.get(STUDY_VARIABLE) or None


def nearest_preset(flat: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the preset with the fewest other values, and these values as they are in `flat`.

    Parameters that `flat` does not have are not compared, because a training has only some.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for path in sorted(Path("presets").glob("*.yaml")):
        preset = flatten_params(read_params(path))
        found.append((path.stem, {k: v for k, v in flat.items() if preset.get(k) != v}))
    return min(found, key=lambda pair: len(pair[1]), default=("", {}))


def saved_views() -> dict[str, str]:
    """Return tags of an experiment in MLflow: views of its page, as the page's button "Share" does.

    "scores" has charts of the scores against λ; "studies" groups the runs by study and seed.
    """
    shown = [f"metrics.`{name}`" for name in ("lambda", "rank", "seed", *SCORES)]
    shown += [f"tags.`{name}`" for name in ("study", "changes")]
    made = {"isGenerated": False, "deleted": False}
    charts = [
        {
            "type": "SCATTER",
            "uuid": name,
            "metricSectionId": "scores",
            **made,
            "runsCountToCompare": 100,
            "xaxis": {"key": "lambda", "type": "METRIC"},
            "yaxis": {"key": name, "type": "METRIC"},
        }
        for name in SCORES
    ]
    section = {"uuid": "scores", "name": "scores", "display": True, "isReordered": False, **made}
    view = {"selectedColumns": shown, "compareRunCharts": charts, "compareRunSections": [section]}
    # MLflow puts its own sections of charts behind ours only if sections are "reordered".
    view |= {"runsHiddenMode": "SHOWALL", "isAccordionReordered": True}
    keys = [{"mode": "tag", "groupByData": "study"}, {"mode": "param", "groupByData": "seed"}]
    grouped = view | {"groupBy": {"aggregateFunction": "average", "groupByKeys": keys}}
    prefix = "mlflow.sharedViewState."
    return {f"{prefix}scores": json.dumps(view), f"{prefix}studies": json.dumps(grouped)}


def view_address(experiment_id: str) -> str:
    """Return the address of the saved view "scores", below the address of MLflow's pages."""
    query = "viewStateShareKey=scores&workflowType=machine_learning"
    return f"#/experiments/{experiment_id}/runs?{query}"
