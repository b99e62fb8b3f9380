"""Set the code dependencies of every stage in dvc.yaml to what the stage imports.

`python .ci/sync_deps.py` rewrites dvc.yaml, comments kept; `--check` only says what it would do and
exits with 1. DVC does not follow imports: without these lines an edited module leaves a stage "up
to date". Other dependencies stay as they are and come first.
"""

import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages.runtime.work_dir import source_files  # noqa: E402  # found from any working directory


def main() -> int:
    """Compare, report and rewrite; return the exit code."""
    yaml = YAML()
    yaml.width = 100
    path = ROOT / "dvc.yaml"
    document = yaml.load(path)
    changes: list[str] = []
    for name, stage in document["stages"].items():
        wanted = [str(file) for file in source_files(f"stages.{name}", code_root=ROOT)]
        if "deps" not in stage:
            stage.insert(1, "deps", [])  # after the command
        deps = stage["deps"]
        present = [dep for dep in deps if str(dep).endswith(".py")]
        if sorted(present) == wanted and len(set(present)) == len(present):
            continue
        changes += [f"{name}: + {file}" for file in wanted if file not in present]
        changes += [f"{name}: - {file}" for file in present if file not in wanted]
        changes += [f"{name}: twice {file}" for file in set(present) if present.count(file) > 1]
        # one by one, so that the comments of the other lines stay
        for index in reversed([i for i, dep in enumerate(deps) if str(dep).endswith(".py")]):
            del deps[index]
        deps.extend(wanted)
    print("\n".join(changes) or "dvc.yaml: code dependencies are complete")  # noqa: T201
    if changes and "--check" in sys.argv[1:]:
        return 1
    if changes:
        yaml.dump(document, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
