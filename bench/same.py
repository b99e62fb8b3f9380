"""Compare two revisions: does a refactoring change any loss or metric?

    python -m bench same 85c8b5b          compare a commit with the working tree
    python -m bench same 85c8b5b HEAD     compare two commits

For each revision, all stages run in a temporary copy, with presets/smoke.yaml and 21 steps of
pretraining, which takes two minutes. Losses must be equal bit for bit. A metric may differ by 1e-4
of its value, because a library may sum in another order. If a number differs by more, the exit code
is 1. .work/same keeps the numbers of commits.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench._copies import ROOT, copy_project, run_in

TOLERANCE = 1e-4
OVERRIDES = {("pretrain", "epochs"): 3, ("runtime", "log_every"): 1}
"""Changes to presets/smoke.yaml: three epochs of seven steps, and every step is logged."""

# MLflow keeps all digits of the losses, but metrics/pretrain.csv only six.
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
"""The keys are `losses` and `metrics`; each value maps names to numbers."""


def main(arguments: Sequence[str]) -> None:
    """Measure both revisions and print the comparison."""
    if not 1 <= len(arguments) <= 2:
        raise SystemExit("usage: python -m bench same REV [REV]   (make same REV=...)")
    first = numbers_of(arguments[0])
    second = numbers_of(arguments[1]) if len(arguments) == 2 else measure(None)
    lines = list(comparison(first, second))
    print(*(line for line, _ in lines), sep="\n")
    num_different = sum(is_different for _, is_different in lines)
    print(f"\n{len(lines)} numbers, {num_different} differ")
    sys.exit(bool(num_different))


def numbers_of(revision: str) -> Numbers:
    """Return a commit's numbers, from .work/same if they have been measured before."""
    commit = run_in(ROOT, "git", "rev-parse", "--verify", f"{revision}^{{commit}}")
    key = hashlib.sha256((commit + repr(OVERRIDES)).encode()).hexdigest()[:16]
    kept = ROOT / f".work/same/{commit[:12]}-{key}.json"
    if not kept.is_file():
        numbers = measure(commit.strip())
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(numbers))
    return json.loads(kept.read_text())


def measure(revision: str | None) -> Numbers:
    """Run the pipeline of a commit, or of the working tree if `revision` is None."""
    with tempfile.TemporaryDirectory() as top:
        project = Path(top) / "project"
        copy_project(project, revision=revision)
        params = (yaml := YAML(typ="safe")).load(project / "presets/smoke.yaml")
        for (section, name), value in OVERRIDES.items():
            params[section][name] = value
        yaml.dump(params, project / "params.yaml")
        run_in(project, "dvc", "repro", environment={"OMP_NUM_THREADS": "1"})
        losses = json.loads(run_in(project, sys.executable, "-c", READ_LOSSES))
        files = sorted((project / "metrics").glob("*.json"))
        metrics = [json.loads(path.read_text()) for path in files]
    return {"losses": losses, "metrics": dict(leaf for file in metrics for leaf in leaves(file))}


def leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (dotted key, value) for each number in nested JSON."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from leaves(value, f"{prefix}[{index}]")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield prefix, float(content)


def comparison(first: Numbers, second: Numbers) -> Iterator[tuple[str, bool]]:
    """Yield a line for each number, and whether its two values differ too much (NaN does)."""
    for kind, tolerance in (("losses", 0.0), ("metrics", TOLERANCE)):
        for name in first[kind] | second[kind]:
            a, b = first[kind].get(name), second[kind].get(name)
            if a is None or b is None:
                yield f"{name}: {a} and {b}", True
            elif a == b:
                yield f"{name}: {a:.12g}, equal", False
            else:
                error = abs(a - b) / max(abs(a), abs(b))
                line = f"{name}: {a:.12g}, {b:.12g}, relative difference {error:.1e}"
                yield line, not error <= tolerance
