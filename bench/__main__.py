"""Run a measurement: `python -m bench NAME` prints a table."""

import importlib
import sys
from pathlib import Path

FILES = sorted(Path(__file__).parent.glob("[!_]*.py"))
NAMES = [path.stem for path in FILES if "\ndef main(" in path.read_text(encoding="utf-8")]

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in NAMES:
        importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])
    else:
        print("usage: python -m bench NAME [arguments]")
        for name in NAMES:
            documentation = importlib.import_module(f"bench.{name}").__doc__ or ""
            print(f"  {name:12} {documentation.splitlines()[0]}")
        sys.exit(f"there is no measurement {sys.argv[1]}" if len(sys.argv) > 1 else 0)
