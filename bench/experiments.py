"""List DVC's experiments as a Markdown table, for docs/log.md.

    python -m bench experiments           experiments of the current commit
    python -m bench experiments a1b2c3    experiments of another commit

A row shows the parameters in which an experiment differs from its commit. If an experiment did
not run all stages (`dvc exp run ... probe`), the commit's scores are shown for the other stages.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "probe top-1": ("metrics/probe.json", "probe.top1", ".1%"),
    "FID": ("metrics/score.json", "score.fid", ".2f"),
    "KID": ("metrics/score.json", "score.kid", ".4f"),
    "denoising error": (
        "metrics/separability.json",
        "separability.denoising_error.contradiff",
        ".4f",
    ),
    "IS": ("metrics/score.json", "score.inception_score", ".2f"),
    "transfer top-1": ("metrics/transfer.json", "transfer.top1.mean", ".1%"),
    "transfer, ridge": ("metrics/transfer.json", "transfer.ridge.mean", ".1%"),
}
"""Title of a column => metrics file, dotted key in the file, and number format."""


def main(arguments: Sequence[str]) -> None:
    """Print the table of one commit's experiments."""
    revision = arguments[0] if arguments else "HEAD"
    command = ["dvc", "exp", "show", "--json", "--rev", revision]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    print("\n".join(table(json.loads(shown.stdout))))


def table(commits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, from `dvc exp show --json`; a missing score is left empty."""
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
