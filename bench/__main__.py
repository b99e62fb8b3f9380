"""Stand ours beside peers: `python -m bench` runs every row, and prints a table.

    python -m bench                      all rows except `repro`; some minutes of an idle core
    python -m bench step loading         some rows
    python -m bench --write              also write docs/benchmarks.json and docs/benchmarks.md
    python -m bench repro --write        the whole pipeline; both cores should be idle
    python -m bench --list               rows and other measurements
    python -m bench gpu --output F       another measurement, with its own arguments

The exit code is 1 if a result differs from its peer's. A missed goal is shown, and is no failure.
"""

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before torch is loaded: two threads that wait for each other would count as CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import stages.runtime  # noqa: F401  both sides keep freed memory, as a stage's process does

from bench import _promise

FILES = sorted(Path(__file__).parent.glob("[!_]*.py"))
TOOLS = [path.stem for path in FILES if path.stem not in _promise.ALL_ROWS]


def main(arguments: Sequence[str]) -> int:
    """Run a tool, or rows of the promise; return the exit code."""
    if arguments and arguments[0] in TOOLS:
        importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])
        return 0
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, formatter_class=form)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to run; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="how often to time; default: 5")
    parser.add_argument("--output", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.json and .md")
    parser.add_argument("--list", action="store_true", help="list rows and other measurements")
    options = parser.parse_args(arguments)
    if options.list:
        print(*listing(), sep="\n")
        return 0
    if unknown := [name for name in options.rows if name not in _promise.ALL_ROWS]:
        known = ", ".join((*_promise.ALL_ROWS, *TOOLS))
        parser.error(f"there is no measurement {unknown[0]!r}; there are: {known}")
    if options.rounds < 1:
        parser.error("--rounds: type 1 or more")
    records: list[_promise.Record] = []
    for record in _promise.run(options.rows or _promise.ROWS, rounds=options.rounds):
        records.append(record)
        print(_promise.line(record), flush=True)
        if options.output is not None:
            _promise.write_json(options.output, records)
    if options.write:
        _promise.write_table(_promise.PAGE, _promise.write_json(_promise.STORE, records))
    return int(not all(record["equal"] for record in records))


def listing() -> list[str]:
    """Return a line for each row and each tool."""
    lines: list[str] = []
    for title, names in (("rows:", _promise.ALL_ROWS), ("other measurements:", TOOLS)):
        lines.append(title)
        for name in names:
            source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
            documentation = ast.get_docstring(ast.parse(source)) or ""
            lines.append(f"  {name:12} {documentation.splitlines()[0]}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
