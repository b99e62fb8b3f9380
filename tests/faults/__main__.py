"""Run a fault program: `python -m tests.faults NAME` prints what went right and wrong."""

import importlib
import sys

NAMES = ("kill", "disk", "load", "malformed")

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in NAMES:
        importlib.import_module(f"tests.faults.{sys.argv[1]}").main(sys.argv[2:])
    else:
        print("usage: python -m tests.faults NAME [arguments]; NAME --help says more")
        for name in NAMES:
            documentation = importlib.import_module(f"tests.faults.{name}").__doc__ or ""
            print(f"  {name:9} {documentation.splitlines()[0]}")
        sys.exit(f"there is no program {sys.argv[1]}" if len(sys.argv) > 1 else 0)
