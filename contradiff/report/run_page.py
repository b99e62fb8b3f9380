"""Writes the page of a run: its command, the costs of its stages, its machine, and other λ.

These facts differ from run to run, although the results are the same. So this page is no out of DVC
and stands beside the report.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from contradiff.report.page import load_template
from contradiff.report.results import RunResults

SCORES = {
    "probe.top1": ("Probe top-1 ↑", ".1%"),
    "score.fid": ("FID ↓", ".2f"),
    "score.kid": ("KID ↓", ".4f"),
    "separability.denoising_error.contradiff": ("Denoising error ↓", ".4f"),
    "transfer.top1.mean": ("Transfer top-1 ↑", ".1%"),
}
"""Dotted key of a score in metrics/ => its title and format, for the table of other λ."""


def render_run(
    results: RunResults,
    *,
    command: str,
    origin: str,
    costs: Mapping[str, Mapping[str, Any]],
    others: Sequence[tuple[float, str, Mapping[str, Any]]],
    machine: Mapping[str, str],
    now: float,
) -> str:
    """Return the page as HTML.

    `costs` has the seconds, memory_mb and end of each measured stage. `others` are the λ, the
    commit and the scores of other runs. `origin` is a sentence that says which code was used.
    """
    work, rows = _work(results), list[list[str]]()
    for stage, cost in sorted(costs.items(), key=lambda item: item[1]["ended"]):
        number, unit = work.get(stage, (0, ""))
        rate = f"{number / cost['seconds']:,.1f} {unit}/s" if number and cost["seconds"] else "–"
        memory = [_megabytes(cost.get(name)) for name in ("memory_mb", "gpu_memory_mb")]
        rows.append([stage, _duration(cost["seconds"]), *memory, rate, _date(cost["ended"])])
    beside = list[list[str]]()
    for weight, commit, scores in sorted(others, key=lambda other: other[0]):
        cells = (_score(scores.get(key), form) for key, (_, form) in SCORES.items())
        beside.append([f"{weight:g}", *cells, commit])
    return load_template("run.html").render(
        command=command,
        origin=origin,
        stages=rows,
        total=_duration(sum((cost["seconds"] for cost in costs.values()), 0.0)),
        columns=["λ", *(title for title, _ in SCORES.values()), "Commit"],
        beside=beside,
        environment=machine,
        written=_date(now),
    )


def _work(results: RunResults) -> dict[str, tuple[int, str]]:
    """Return how many things each stage makes or reads, and what they are."""
    numbers = {
        split: sum(shard.num_samples for shard in shards)
        for split, shards in results.images.splits.items()
    }
    images, score = sum(numbers.values()), results.score
    batch_size = results.pretrain.params.get("pretrain", {}).get("batch_size", 0)
    return {
        **dict.fromkeys(("shard", "latents", "features", "baselines"), (images, "images")),
        "pretrain": (results.pretrain.num_steps * batch_size, "images"),
        **dict.fromkeys(("generate", "score"), (score.num_samples, "samples")),
        "reference": (score.num_reference, "images"),
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _megabytes(number: int | None) -> str:
    return "–" if number is None else f"{number:,} MB"


def _score(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"
