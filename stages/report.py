"""report: write all results as a web page, as Markdown, and as a summary in JSON.

metrics/headline.json has the few numbers that `dvc exp show` and `dvc metrics diff` show.
"""

from stages.runtime.run import Run, execute

from pathlib import Path

from contradiff.config import Section, Seed
from contradiff.files import replace_dir, replace_file
from contradiff.report.figures import plot_losses
from contradiff.report.headline import headline
from contradiff.report.page import render, summarise
from contradiff.report.results import read_results


class Params(Section):
    seed: Seed


def main(params: Params, run: Run) -> None:
    results = read_results(Path(), seed=params.seed)
    page = Path("build/report/index.html")
    loss, loss_dark = (plot_losses(results.curve, dark=dark) for dark in (False, True))
    outs = {
        "report.md": render("report.md", results).encode(),
        "summary.json": summarise(results, report=page.as_posix()).encode(),
        page.name: render("report.html", results, loss=loss, loss_dark=loss_dark).encode(),
    }
    with replace_dir(page.parent) as folder:
        for name, content in outs.items():
            (folder / name).write_bytes(content)
    with replace_file(Path("build/figures/loss.png")) as temporary:
        temporary.write_bytes(loss)
    run.write_json(Path("metrics/headline.json"), headline(results))
    run.log(f"wrote {page}")


if __name__ == "__main__":
    execute(Params, main)
