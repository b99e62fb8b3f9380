"""Writes docs/studies/NAME.md, .csv and figures from a study and its stored results alone."""

import csv
import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from contradiff.files import replace_file
from contradiff.studies.comparison import (
    Comparison,
    Difference,
    Spread,
    compare,
    paired_difference,
    spread,
)
from contradiff.studies.figures import plot_bubbles, plot_rows, plot_training
from contradiff.studies.members import describe
from contradiff.studies.store import PAGES, RESULTS, Record, Store, samples_of
from contradiff.studies.study import Column, Study, changes_of

_CAPTIONS = {
    "": (
        "Curve",
        "Grey: each seed. Blue: means over seeds, with their standard deviations as bars.",
    ),
    "-bubble": (
        "Accuracy against generation, as in the paper's Fig. 1",
        "A circle is the mean over seeds, bars are standard deviations.",
        "A circle's area is the number of trainable parameters.",
    ),
    "-training": ("Training", "Means over seeds, and over groups of consecutive steps."),
}
"""How a figure's name ends => its title, and what it shows."""


def write_pages(root: Path, name: str, study: Study, store: Store) -> list[Path]:
    """Write a study's page, table and figures; return their paths."""
    written: list[Path] = []
    for file, content in pages(root, name, study, store).items():
        path = root / PAGES / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
        written.append(path)
    return written


def pages(root: Path, name: str, study: Study, store: Store) -> dict[str, str]:
    """Return the name and content of each file of a study's page.

    Pictures of samples lie in docs/studies below `root`, and are only named.
    """
    compared = compare(study, store)

    drawn = {
        f"{name}.svg": plot_rows(compared, study.curve) if study.curve else None,
        f"{name}-bubble.svg": plot_bubbles(compared, study.bubble) if study.bubble else None,
        f"{name}-training.svg": plot_training(compared) if study.curve else None,
    }
    figures = {file: content for file, content in drawn.items() if content is not None}
    lines = _page(name, study, store, root=root, compared=compared, figures=list(figures))
    return {f"{name}.md": "\n".join(lines) + "\n", f"{name}.csv": _csv(study, compared)} | figures


def _page(
    name: str,
    study: Study,
    store: Store,
    *,
    root: Path,
    compared: Comparison,
    figures: Sequence[str],
) -> Iterator[str]:
    yield f"# {name}: {study.question}"
    yield ""
    source = f"`{RESULTS}/{name}.json`"
    yield f"`contradiff study {name} --report` writes this page from {source}; do not edit it."
    yield f"`contradiff study {name} --run` computes what is missing."
    yield ""
    yield "## Measured here, and printed in the paper"
    yield ""
    yield from _table(study, compared)
    yield ""
    seeds = ", ".join(map(str, study.seeds))
    yield f"Mean ± standard deviation over seeds ({seeds})."
    yield "n is the number of seeds, if some are missing."
    yield "The paper prints one number, and no spread."
    if study.paper:
        yield ""
        yield f"**The paper's protocol.** {study.paper}"
    if study.differences:
        yield ""
        yield "**How ours differs.** The paper's numbers are no targets for ours:"
        yield ""
        yield from (f"- {text}" for text in study.differences)
    if any(row.protocol for row in study.own_rows):
        yield ""
        yield "**How each row was measured here:**"
        yield ""
        for row in study.own_rows:
            if row.protocol:
                yield f"- {row.title}: {row.protocol}"
    yield from _differences(study, compared)
    for ending, (title, *notes) in _CAPTIONS.items():
        if (file := f"{name}{ending}.svg") in figures:
            yield from ("", f"## {title}", "", f"![{name}]({file})", "", *notes)
    yield from _samples(root, name, study, compared)
    yield from _provenance(name, study, store, compared)


def _table(study: Study, compared: Comparison) -> Iterator[str]:
    in_paper = [name for name in study.columns if any(name in row.paper for row in study.rows)]
    heads = [""]
    for name, column in study.columns.items():
        heads.append(f"{column.heading}, here")
        if name in in_paper:
            heads.append(f"{column.title}, paper")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in study.rows:
        cells = [row.title]
        for name, column in study.columns.items():
            if row.set is None:
                cells.append("–")
            else:
                cells.append(_mean(spread(compared.values(row, name)), column, study))
            if name in in_paper:
                cells.append(row.paper.get(name, "–"))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _mean(found: Spread | None, column: Column, study: Study) -> str:
    if found is None:
        return "missing"
    text = format(found.mean, column.format)
    if found.std:  # a number of parameters has no spread
        text += f" ± {_unsigned(found.std, column)}"
    return text if found.number == len(study.seeds) else f"{text} (n = {found.number})"


def _unsigned(value: float, column: Column) -> str:
    """Format a spread or a difference; percentages become points, without their sign."""
    return format(value, column.format).removesuffix("%")


def _signed(value: float, column: Column) -> str:
    return format(value, f"+{column.format}").removesuffix("%")


def _differences(study: Study, compared: Comparison) -> Iterator[str]:
    baseline = next((row for row in study.own_rows if row.title == study.baseline), None)
    if baseline is None:
        return
    lines: list[str] = []
    columns = {name: each for name, each in study.columns.items() if each.better}
    for row in study.own_rows:
        cells = [row.title]
        for name, column in columns.items():
            pair = compared.values(row, name), compared.values(baseline, name)
            cells.append(_difference(paired_difference(*pair), column))
        if row is not baseline:
            lines.append(f"| {' | '.join(cells)} |")
    heads = ["", *(column.heading for column in columns.values())]
    yield from ("", f"## Differences from *{baseline.title}*", "")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    yield from lines
    yield ""
    yield "Mean of the differences between equal seeds, and its 95% interval by Student's paired"
    yield "t-test: two-sided, n − 1 degrees of freedom, n the number of common seeds, not corrected"
    yield "for the number of comparisons."
    yield "Differences of percentages are points. **Bold**: the interval excludes 0."


def _difference(found: Difference | None, column: Column) -> str:
    if found is None:
        return "–"
    text = _signed(found.mean, column)
    if found.interval is None:
        return f"{text} (n = 1)"
    low, high = (_signed(end, column) for end in found.interval)
    text = f"{text} [{low}, {high}]"
    return f"**{text}**" if found.excludes_zero else text


def _samples(root: Path, name: str, study: Study, compared: Comparison) -> Iterator[str]:
    if not study.samples:
        return
    seed, lines = study.seeds[0], list[str]()
    for row in study.own_rows:
        record = compared.record(row, seed)
        file = samples_of(name) / f"{record.digest}.png" if record else None
        if file and (root / file).is_file():
            lines.append(f"| {row.title} | ![samples]({file.relative_to(PAGES).as_posix()}) |")
    if lines:
        yield from ("", "## Samples", "", "| | |", "|---|---|")
        yield from lines
        yield ""
        yield f"The first 16 samples of seed {seed}, from the same noise; none was selected."


def _provenance(name: str, study: Study, store: Store, compared: Comparison) -> Iterator[str]:
    yield from ("", "## Where the numbers come from", "")
    records = list(compared.records.values())
    if records:
        revisions = sorted({each.revision[:7] for each in records})
        last = datetime.fromtimestamp(max(each.time for each in records), UTC)
        yield f"{len(records)} experiments on commit {', '.join(revisions)}."
        yield f"The last of them was finished on {last:%Y-%m-%d}."
        yield "All have the same code (the files and folders that the stages read here depend on;"
        yield f"digest `{compared.code}`), and the same parameters but for the rows' changes."
        if "score" in study.stages:
            yield "Experiments with the same seed have the same reference images and extractor."
        yield ""
        yield f"[{name}.csv]({name}.csv) has every value."
        sections = list(_settings(study, store, records[0]))
        if sections:
            yield from ("", f"Settings: {', '.join(sections)}.")
    if compared.missing:
        yield from ("", "**Missing:**", "")
        for row, seeds in compared.missing:
            shown = describe(changes_of(study, row))
            yield f"- {row.title} (`{shown}`): seed {', '.join(map(str, seeds))}"
    aside = [
        *((each.experiment, each.changes, each.seed, why) for each, why in compared.aside),
        *((each.experiment, each.changes, each.seed, each.why) for each in store.aside),
    ]
    if aside:
        yield from ("", "**Set aside**, and in no average:", "")
        for experiment, changes, seed, why in aside:
            yield f"- {experiment}, `{describe(changes)}`, seed {seed}: {why}"


def _settings(study: Study, store: Store, record: Record) -> Iterator[str]:
    """Yield the settings that readers ask for first."""
    params = store.params[record.base] | record.changes
    asked = ["data.source", "data.num_train", "data.num_val", "pretrain.epochs"]
    asked += ["pretrain.batch_size"]
    if "score" in study.stages:
        asked += ["generate.num_samples", "generate.solver", "generate.num_inference_steps"]
        asked += ["extractor.kind"]
    if "probe" in study.stages:
        asked += ["probe.headline", "probe.split"]
    for key in asked:
        if key in params and key not in study.fixed:
            value = params[key]
            shown = f"{value:g}" if isinstance(value, float) else value
            yield f"{key} {shown}"


def _csv(study: Study, compared: Comparison) -> str:
    """Return all values as CSV, a line for each row and seed."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["row", "changes", "seed", "experiment", "revision", *study.columns])
    for row in study.own_rows:
        for seed in study.seeds:
            record = compared.record(row, seed)
            values = [compared.values(row, name).get(seed, "") for name in study.columns]
            origin = [record.experiment, record.revision] if record else ["missing", ""]
            writer.writerow([row.title, describe(changes_of(study, row)), seed, *origin, *values])
    return buffer.getvalue()
