"""List DVC's experiments as a Markdown table, ready for docs/log.md.

    python -m bench experiments           experiments of the present commit
    python -m bench experiments a1b2c3    experiments of another commit

A row is named by the parameters in which it differs from its commit. An experiment that stopped at
a stage (`dvc exp run ... probe`) shows its commit's scores for later stages.
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
        own: dict[str, Any] | None = None
        for data in (run["data"] for run in [commit, *runs] if run.get("data")):
            settings = _flatten(data["params"]["params.yaml"]["data"])
            name = "as committed" if own is None else "no change"
            own = own or settings
            changes = [f"{k}={v}" for k, v in settings.items() if v != own.get(k)]
            cells, metrics = [commit["rev"][:7], " ".join(changes) or name], data.get("metrics")
            for file, key, form in COLUMNS.values():
                score = _flatten(((metrics or {}).get(file) or {}).get("data") or {}).get(key)
                cells.append("" if score is None else f"{score:{form}}")
            yield f"| {' | '.join(cells)} |"


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        flat |= _flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat
