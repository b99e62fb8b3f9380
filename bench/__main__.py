"""`python -m bench NAME`: measurements, each a table on stdout. Ratios, not seconds, are quoted."""

import importlib
import sys
from pathlib import Path

BENCHES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def first_line(name: str) -> str:
    """What a bench measures, in the words of its module."""
    return (importlib.import_module(f"bench.{name}").__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        lines = [f"  {name:12} {first_line(name)}" for name in BENCHES]
        print("\n".join(["usage: python -m bench NAME [arguments]", *lines]))
        sys.exit(0 if len(sys.argv) < 2 else f"{sys.argv[1]} is none of them")
    importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])
