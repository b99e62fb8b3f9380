"""track: record the experiment as one run in MLflow, print its results, and write its run's page.

The stage runs at the end of every `dvc repro`, even if DVC took all other stages from its cache.
"""

from stages.runtime.origin import code_of_run, command_of, describe_machine
from stages.runtime.run import PARAMS_FILE, Run, execute
from stages.runtime.times import read_costs
from stages.runtime.tracking import upsert_row
from stages.runtime.work_dir import delete_finished

import textwrap
import time
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from contradiff.config import Section, flatten, read_params
from contradiff.files import explain_damage, read_json, replace_file
from contradiff.imports import slow_import
from contradiff.report.results import read_results
from contradiff.report.run_page import render_run

RUN_PAGE, STUDIES = Path("build/run/index.html"), Path("studies/results")


class Params(Section):
    """Empty, because the stage reads all of params.yaml."""


def main(_params: Params, run: Run) -> None:
    params = read_params(PARAMS_FILE)
    print(table(Path("build/report/summary.json")))
    write_run_page(run, params)
    # Other models than the trained one are no results of this experiment.
    is_trained = params["features"]["model"] == "contradiff"
    upsert_row(
        run,
        params=params,
        metrics=metric_files(Path("dvc.yaml")),
        curve=Path("metrics/pretrain.csv"),
        artifacts=[Path("build/figures/samples.png"), Path("build/report"), RUN_PAGE.parent],
        export=export_model if is_trained else None,
    )
    delete_finished(run.root)  # DVC has recorded all results by now


def export_model(folder: Path) -> None:
    """Write the trained model as `contradiff export` does."""
    with slow_import():  # only new rows need it
        from contradiff.pretrained.project import export

    export(folder)


def write_run_page(run: Run, params: Mapping[str, Any]) -> None:
    """Write the page with the costs, the command and the machine of the run."""
    page = render_run(
        read_results(Path(), seed=params["seed"]),
        command=command_of(params),
        origin=code_of_run(),
        costs=read_costs(run.root, params),
        others=other_weights(params),
        machine=describe_machine(),
        now=time.time(),
    )
    RUN_PAGE.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(RUN_PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    run.log(f"wrote {RUN_PAGE}")


def other_weights(params: Mapping[str, Any]) -> list[tuple[float, str, dict[str, Any]]]:
    """Find runs in studies/results that differ from `params` in loss.lambda alone.

    Return λ, commit and scores of each. A run that several studies have is one, with all scores.
    """
    flat = {key: value for key, value in flatten(params) if not key.startswith("runtime.")}
    found: dict[tuple[float, str], dict[str, Any]] = {}
    for path in sorted(STUDIES.glob("*.json")):
        remedy = f"`git checkout {path}` restores it"
        store = read_json(path, remedy=remedy)
        with explain_damage(path, remedy=remedy):
            for record in store["records"]:
                own = store["params"][record["base"]] | record["changes"] | {"seed": record["seed"]}
                if {**own, "loss.lambda": None} == {**flat, "loss.lambda": None}:
                    key = own["loss.lambda"], record["revision"][:7]
                    found[key] = found.get(key, {}) | record["metrics"]
    return [(*key, scores) for key, scores in found.items()]


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
