"""List DVC's experiments as a Markdown table, ready for docs/log.md.

    python -m bench experiments           experiments of the present commit
    python -m bench experiments a1b2c3    experiments of another commit

A row is named by the parameters in which it differs from its commit. An experiment that ran only up
to some stage (`dvc exp run ... probe`) shows its commit's scores for the later stages.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "probe top-1": ("metrics/probe.json", "probe.top1", ".1%"),
    "FID": ("metrics/score.json", "score.fid", ".2f"),
    "IS": ("metrics/score.json", "score.inception_score", ".2f"),
    "transfer, ridge": ("metrics/transfer.json", "transfer.ridge.mean", ".1%"),
    "transfer, SGD": ("metrics/transfer.json", "transfer.sgd.mean", ".1%"),
}
"""Title of a column => file, key and format."""


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    revision = arguments[0] if arguments else "HEAD"
    command = ["dvc", "exp", "show", "--json", "--rev", revision]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    print("\n".join(table(json.loads(shown.stdout))))


def table(commits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table's lines from what `dvc exp show --json` prints; a missing score is empty."""
    yield "| commit | parameters | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for commit in commits:
        if commit["rev"] == "workspace" or not commit.get("data"):
            continue
        runs = [run for experiment in commit.get("experiments") or [] for run in experiment["revs"]]
        own = _settings(commit["data"])
        yield _line(commit, "as committed", commit["data"])
        for data in (run["data"] for run in runs if run.get("data")):
            changes = [f"{k}={v}" for k, v in _settings(data).items() if v != own.get(k)]
            yield _line(commit, " ".join(changes) or "no change", data)


def _line(commit: Mapping[str, Any], name: str, data: Mapping[str, Any]) -> str:
    cells, metrics = [commit["rev"][:7], name], data.get("metrics") or {}
    for file, key, form in COLUMNS.values():
        score = _flatten((metrics.get(file) or {}).get("data") or {}).get(key)
        cells.append("" if score is None else f"{score:{form}}")
    return f"| {' | '.join(cells)} |"


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    return _flatten(data["params"]["params.yaml"]["data"])


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        flat |= _flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat
