"""report: all results of the run => one page, its Markdown twin, and a summary for programs."""

from stages._runtime import Run, execute

from pathlib import Path

from contradiff.atomic import replace_file
from contradiff.config import Section, Seed
from contradiff.reporting import (
    draw_figures,
    embed_features,
    read_results,
    render_html,
    render_markdown,
    result_rows,
    summarise,
)


class Params(Section):
    seed: Seed


def main(params: Params, run: Run) -> None:
    results = read_results(Path(), seed=params.seed)
    embedding = embed_features(results.features, results.labels, seed=params.seed)
    figures = draw_figures(results, embedding)
    page = Path("build/report/index.html")
    outs = {
        Path("build/figures/loss.png"): figures.loss,
        page.with_name("report.md"): render_markdown(results, embedding).encode(),
        page.with_name("summary.json"): summarise(
            result_rows(results), report=page.as_posix()
        ).encode(),
        page: render_html(results, embedding, figures).encode(),
    }
    for path, content in outs.items():
        with replace_file(path) as temporary:
            temporary.write_bytes(content)
    run.log(f"wrote {page}")


if __name__ == "__main__":
    execute(Params, main)
