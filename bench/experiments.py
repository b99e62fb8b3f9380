"""DVC's experiments as a Markdown table: what an entry of docs/log.md is made of.

    python -m bench experiments        those of the present commit
    python -m bench experiments a1b2c3 those of another one

A row's name is what its parameters have that the commit's own do not. Experiments do not travel
with a clone: a table does. Of an experiment that was run to a target (`dvc exp run ... probe`),
scores of stages that were not run for it are those of its commit.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS: Mapping[str, tuple[str, str]] = {
    "probe top-1": ("metrics/probe.json", "probe.top1"),
    "FID": ("metrics/score.json", "score.fid"),
    "IS": ("metrics/score.json", "score.inception_score"),
    "transfer, ridge": ("metrics/transfer.json", "transfer.ridge.mean"),
    "transfer, SGD": ("metrics/transfer.json", "transfer.sgd.mean"),
}
SHARES = ("probe top-1", "transfer, ridge", "transfer, SGD")
"""Columns in [0, 1], shown in per cent."""


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    revision = arguments[0] if arguments else "HEAD"
    command = ["dvc", "exp", "show", "--json", "--rev", revision]
    shown = subprocess.run(command, capture_output=True, check=True)
    print("\n".join(table(json.loads(shown.stdout))))


def table(commits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the table, from what `dvc exp show --json` prints."""
    yield "| commit | parameters | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for commit in commits:
        if commit["rev"] == "workspace" or not commit.get("data"):
            continue
        own = parameters(commit["data"])
        yield line(commit["rev"][:7], "as committed", commit["data"])
        for experiment in commit.get("experiments") or []:
            for revision in experiment["revs"]:
                if data := revision.get("data"):
                    given = parameters(data)
                    changes = [f"{key}={given[key]}" for key in given if given[key] != own.get(key)]
                    yield line(commit["rev"][:7], " ".join(changes) or "no change", data)


def parameters(data: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys and values of params.yaml."""
    return dict(_leaves(data["params"]["params.yaml"]["data"], prefix=""))


def _leaves(content: Mapping[str, Any], *, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def line(commit: str, name: str, data: Mapping[str, Any]) -> str:
    """One row; a score that was not computed is left empty."""
    cells = [shown(column, data.get("metrics") or {}) for column in COLUMNS]
    return f"| {commit} | {name} | " + " | ".join(cells) + " |"


def shown(column: str, metrics: Mapping[str, Any]) -> str:
    """A score as text."""
    path, key = COLUMNS[column]
    value: Any = (metrics.get(path) or {}).get("data") or {}
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return ""
    return f"{100 * value:.1f}%" if column in SHARES else f"{value:.2f}"
