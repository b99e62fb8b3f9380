"""track: record the experiment as one run in MLflow, and print its results.

The stage runs at the end of every `dvc repro`, even if DVC took all other stages from its cache.
"""

from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.tracking import upsert_row
from stages.runtime.work_dir import delete_finished

import textwrap
from pathlib import Path

from contradiff.config import Section, read_params
from contradiff.files import explain_damage, read_json


class Params(Section):
    """Empty, because the stage reads all of params.yaml."""


def main(_params: Params, run: Run) -> None:
    print(table(Path("build/report/summary.json")))
    run_id = upsert_row(
        run,
        params=read_params(PARAMS_FILE),
        metrics=sorted(Path("metrics").glob("*.json")),
        curve=Path("metrics/pretrain.csv"),
        artifacts=[Path("build/figures/samples.png"), Path("build/report")],
    )
    delete_finished(run.root)  # DVC has recorded all results by now
    run.log(f"recorded in MLflow as run {run_id}; `mlflow ui` shows the results")


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
