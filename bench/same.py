"""Does a refactoring change any result? Two revisions run the smoke preset; their numbers compared.

    python -m bench same 85c8b5b          the working tree against a commit
    python -m bench same 85c8b5b HEAD     two commits

Each side runs the whole pipeline in a throw-away copy, by its own code and presets/smoke.yaml, with
one thread and 21 steps of pretraining. Printed are each step's losses, which must be equal bit for
bit, and every metric, which may differ by 1e-4 of its value (a library may sum in another order).
Exit code 1 if something differs by more. Takes two minutes a side; a commit's numbers are kept in
.work/same, the working tree's are not. `make same REV=85c8b5b` calls it.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench._copies import ROOT, copy_revision, copy_working_tree, run_in

TOLERANCE = 1e-4
OVERRIDES = {("pretrain", "epochs"): 3, ("runtime", "log_every"): 1}
"""Of presets/smoke.yaml: three epochs of seven steps, each logged."""

# MLflow keeps the losses as float64; metrics/pretrain.csv rounds them to six digits.
READ_LOSSES = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("contradiff-train").experiment_id
run = client.search_runs([experiment])[0]
json.dump({
    f"{name} at step {point.step}": point.value
    for name in sorted(run.data.metrics) if name.startswith("train/")
    for point in client.get_metric_history(run.info.run_id, name)
}, sys.stdout)
"""

Numbers = dict[str, dict[str, float]]
"""`losses` and `metrics`, by name."""


def main(arguments: Sequence[str]) -> None:
    """Run both sides, print the comparison."""
    if not 1 <= len(arguments) <= 2:
        raise SystemExit("usage: python -m bench same REV [REV]   (make same REV=...)")
    first = numbers_of(arguments[0])
    second = numbers_of(arguments[1] if len(arguments) == 2 else None)
    lines = list(comparison(first, second))
    print("\n".join(line for line, _ in lines))
    num_different = sum(is_different for _, is_different in lines)
    print(f"\n{len(lines)} numbers, {num_different} differ")
    sys.exit(bool(num_different))


def numbers_of(revision: str | None) -> Numbers:
    """The losses and metrics of a commit, or, for None, of the working tree."""
    if revision is None:
        return measure(None)
    command = ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256((commit + repr(OVERRIDES)).encode()).hexdigest()[:16]
    kept = ROOT / ".work/same" / f"{commit[:12]}-{key}.json"
    if not kept.is_file():
        numbers = measure(commit.strip())
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(numbers))
    return json.loads(kept.read_text())


def measure(revision: str | None) -> Numbers:
    """Run the pipeline of one side."""
    with tempfile.TemporaryDirectory() as top:
        project = Path(top) / "project"
        if revision is None:
            copy_working_tree(project)
        else:
            copy_revision(revision, project)
        yaml = YAML(typ="safe")
        params = yaml.load(project / "presets/smoke.yaml")
        for (section, name), value in OVERRIDES.items():
            params[section][name] = value
        yaml.dump(params, project / "params.yaml")
        one_thread = {"OMP_NUM_THREADS": "1"}
        run_in(project, "dvc", "pull", "pretrain_base")
        run_in(project, "dvc", "repro", environment=one_thread)
        losses = json.loads(run_in(project, sys.executable, "-c", READ_LOSSES))
        metrics = {
            key: value
            for path in sorted((project / "metrics").glob("*.json"))
            for key, value in leaves(json.loads(path.read_text()))
        }
    return {"losses": losses, "metrics": metrics}


def leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested JSON under their dotted keys."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from leaves(value, f"{prefix}[{number}]")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield prefix, float(content)


def comparison(first: Numbers, second: Numbers) -> Iterator[tuple[str, bool]]:
    """Yield a line for each number, and whether it differs by more than it may."""
    for kind, tolerance in (("losses", 0.0), ("metrics", TOLERANCE)):
        for name in sorted(first[kind] | second[kind], key=_natural):
            a, b = first[kind].get(name), second[kind].get(name)
            if a is None or b is None:
                yield f"{name}: {a} and {b}", True
                continue
            difference = abs(a - b) / max(abs(a), abs(b), 1e-12)
            said = "equal" if a == b else f"{b:.12g}, relative difference {difference:.1e}"
            yield f"{name}: {a:.12g}, {said}", difference > tolerance


def _natural(name: str) -> list[object]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
