"""track: record the experiment as one run in MLflow, and print its results.

The stage runs at the end of every `dvc repro`, even if DVC took all other stages from its cache.
"""

from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.tracking import upsert_row
from stages.runtime.work_dir import delete_finished

import textwrap
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from contradiff.config import Section, read_params
from contradiff.files import explain_damage, read_json
from contradiff.pretrained.project import export


class Params(Section):
    """Empty, because the stage reads all of params.yaml."""


def main(_params: Params, run: Run) -> None:
    params = read_params(PARAMS_FILE)
    print(table(Path("build/report/summary.json")))
    # Other models than the trained one are no results of this experiment.
    is_trained = params["features"]["model"] == "contradiff"
    upsert_row(
        run,
        params=params,
        metrics=metric_files(Path("dvc.yaml")),
        curve=Path("metrics/pretrain.csv"),
        artifacts=[Path("build/figures/samples.png"), Path("build/report")],
        export=export if is_trained else None,
    )
    delete_finished(run.root)  # DVC has recorded all results by now


def metric_files(pipeline: Path) -> list[Path]:
    """Return all files of metrics that the pipeline writes, even if one is missing.

    metrics/headline.json, which DVC shows, only repeats numbers of the others.
    """
    stages: Iterable[dict[str, Any]] = read_params(pipeline)["stages"].values()
    names = {
        next(iter(out))
        for stage in stages
        for out in stage.get("outs", [])
        if isinstance(out, dict)
    }
    return sorted(Path(name) for name in names if fnmatch(name, "metrics/*.json"))


def table(summary: Path) -> str:
    """Return the report's summary as a text table, with the report's path at the end."""
    remedy = "run `dvc repro report`"
    content = read_json(summary, remedy=remedy)
    with explain_damage(summary, remedy=remedy):
        rows = [(str(name), str(value)) for name, value in content["rows"]]
        report = content["report"]
    width = max((len(name) for name, _ in rows), default=0) + 2
    wrap = textwrap.TextWrapper(width=100, subsequent_indent=" " * width).fill
    lines = [wrap(f"{name:<{width}}{value}") for name, value in rows]
    return "\n".join([*lines, "", f"report: {report}"])


if __name__ == "__main__":
    execute(Params, main)
