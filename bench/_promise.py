"""The promise: rows that stand ours beside a peer's, as JSON and as a table in a page."""

import datetime as dt
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench._copies import ROOT
from bench._page import replace_between
from bench._turns import UNITS, Kind, Row

ROWS = ("step", "sampling", "features", "choices", "loading", "frechet", "probe", "startup")
"""The modules whose rows run without being named."""
ALL_ROWS = (*ROWS, "repro")
PAGE, STORE = ROOT / "docs/benchmarks.md", ROOT / "docs/benchmarks.json"
PACKAGES = ("torch", "diffusers", "peft", "scikit-learn", "torchvision", "webdataset")

Record = dict[str, Any]
"""A row as JSON: its fields, the module, the commit and the date."""


def run(names: Sequence[str], *, rounds: int) -> Iterator[Record]:
    """Run modules one after the other, and yield their rows."""
    import torch

    torch.set_num_threads(1)
    about = {"commit": _commit(), "date": dt.datetime.now(dt.UTC).date().isoformat()}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for row in import_module(f"bench.{name}").rows(Path(folder), rounds=rounds):
                yield as_record(name, row) | about


def as_record(module: str, row: Row) -> Record:
    """Return a row as JSON."""
    return {"bench": module, **asdict(row), "equal": row.is_equal, "reached": row.reached}


def write_json(path: Path, records: Sequence[Record]) -> list[Record]:
    """Write rows, and keep the file's rows of modules that did not run; return all rows.

    Raises SystemExit if the file's rows were measured on another machine.
    """
    ran, here = {record["bench"] for record in records}, _machine()
    kept: list[Record] = []
    if path.is_file() and ran != set(ALL_ROWS):
        known = json.loads(path.read_text(encoding="utf-8"))
        kept = [record for record in known["rows"] if record["bench"] not in ran]
        if kept and known["machine"] != here:
            raise SystemExit(f"{path} is of another machine; delete it, and run all rows again")
    ordered = sorted([*kept, *records], key=lambda record: ALL_ROWS.index(record["bench"]))
    content = {"machine": here, "rows": ordered}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return ordered


def write_table(page: Path, records: Sequence[Record]) -> None:
    """Replace the table of a page."""
    machine = _machine()
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    cores = f"{machine['cores']} cores with {machine['instructions']}"
    source = f"{machine['cpu']}, {cores}; {packages}"
    how = "Ratios of CPU time of one thread: median (lowest–highest) of the rounds"
    written = f"Written by `python -m bench --write` on {source}. {how}."
    replace_between(page, "promise", [written, "", *table(records)])


def table(records: Sequence[Record]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| ours | beside | figure | goal | reached | difference | remark | run |"
    yield "|---|---|---|---|---|---|---|---|"
    for record in records:
        kind: Kind = record["kind"]
        sign = "≥" if kind == "speed" else "≤"
        goal = "" if record["goal"] is None else f"{sign} {record['goal']:g}"
        reached = {True: "yes", False: "**no**", None: ""}[record["reached"]]
        run_of = f"{record['date']}, {record['commit']}, {record['rounds']} rounds"
        cells = [record["name"], record["peer"], figure(record), goal, reached]
        cells += [difference(record), record["note"], run_of]
        yield f"| {' | '.join(cells)} |"


def figure(record: Record) -> str:
    """Return the median with its unit and spread, or say that the results differ."""
    if not record["equal"]:
        return "not timed: the results differ"
    spread = f" ({record['lowest']:.2f}–{record['highest']:.2f})" if record["rounds"] > 1 else ""
    return f"{record['figure']:.2f}{UNITS[record['kind']]}{spread}"


def difference(record: Record) -> str:
    """Return the difference between the results and its tolerance."""
    if record["tolerance"] is None:
        return ""
    return f"{record['error']:.1e}, allowed {record['tolerance']:g}"


def line(record: Record) -> str:
    """Return a row for a terminal."""
    goal = "" if record["goal"] is None else f", goal {record['goal']:g}"
    reached = {True: " reached", False: " MISSED", None: ""}[record["reached"]]
    beside = f"\n{'':6}beside {record['peer']}" if record["peer"] else ""
    return f"{record['name']:50} {figure(record)}{goal}{reached}{beside}"


def _machine() -> Record:
    import torch

    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = {name: version(name) for name in PACKAGES}
    cpu = models[0] if models else platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()  # many processors share a name
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instructions": instructions,
        "packages": packages,
    }


def _commit() -> str:
    """Return the commit, with a plus if files differ from it, or "no git"."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "contradiff", "bench")
    return f"{git('rev-parse', '--short', 'HEAD') or 'no git'}{'+' if changed else ''}"
