"""track: record the experiment as one row in MLflow, and print its results.

It runs at the end of every reproduction, even if all other stages came from DVC's cache.
"""

from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.tracking import upsert_row

import json
import textwrap
from pathlib import Path

from contradiff.config import Section, read_params


class Params(Section):
    """Empty, because the stage copies all parameters."""


def main(_params: Params, run: Run) -> None:
    print(table(Path("build/report/summary.json")))
    run_id = upsert_row(
        run,
        params=read_params(PARAMS_FILE),
        metrics=sorted(Path("metrics").glob("*.json")),
        curve=Path("metrics/pretrain.csv"),
        artifacts=[Path("build/figures/samples.png"), Path("build/report")],
    )
    run.log(f"recorded as MLflow run {run_id}; to see it: mlflow ui")


def table(summary: Path) -> str:
    """Return the rows of the report's summary as aligned lines, and where the report is."""
    content = json.loads(summary.read_text(encoding="utf-8"))
    rows: list[tuple[str, str]] = content["rows"]
    width = max((len(name) for name, _ in rows), default=0) + 2
    wrap = textwrap.TextWrapper(width=100, subsequent_indent=" " * width).fill
    lines = [wrap(f"{name:<{width}}{value}") for name, value in rows]
    return "\n".join([*lines, "", f"report: {content['report']}"])


if __name__ == "__main__":
    execute(Params, main)
