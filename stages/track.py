"""Record the experiment as one row in MLflow, and print its table.

It runs at the end of every reproduction, also where all other stages came from DVC's cache.
"""

from stages.runtime.experiments import Results, upsert_row
from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.tracking import CHECKPOINT

import json
import textwrap
from pathlib import Path

from contradiff.config import Section, read_params

LINE_WIDTH = 100
SUMMARY = Path("build/report/summary.json")


class Params(Section):
    """None: the parameters are copied, whatever they are."""


def main(_params: Params, run: Run) -> None:
    """Print the table of results, then write the row in MLflow."""
    print(table(SUMMARY))
    results = Results(
        params=read_params(PARAMS_FILE),
        metrics=sorted(Path("metrics").glob("*.json")),
        curve=Path("metrics/pretrain.csv"),
        checkpoint=CHECKPOINT,
        artifacts=[Path("build/figures/samples.png"), Path("build/report")],
    )
    run_id = upsert_row(results, run=run)
    run.log(f"recorded as MLflow run {run_id}; to see it: mlflow ui")


def table(summary: Path) -> str:
    """Return the rows of the report's summary as aligned lines, and where the report is.

    Raises:
        FileNotFoundError: there is no summary; the stage `report` writes it.
    """
    content = json.loads(summary.read_text(encoding="utf-8"))
    rows: list[tuple[str, str]] = content["rows"]
    width = max((len(name) for name, _ in rows), default=0) + 2
    lines = [
        textwrap.fill(
            value, LINE_WIDTH, initial_indent=f"{name:<{width}}", subsequent_indent=" " * width
        )
        for name, value in rows
    ]
    return "\n".join([*lines, "", f"report: {content['report']}"])


if __name__ == "__main__":
    execute(Params, main)
