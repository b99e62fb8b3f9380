"""Records how long stages take, and how much memory they need, in .work/times.

A record belongs to a stage and its parameters, and the newest record counts. So an experiment finds
the times of stages that DVC takes from its cache, too.
"""

from stages.runtime.passwords import hide_passwords
from stages.runtime.work_dir import key_of

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from contradiff.config import Section
from contradiff.files import explain_damage, read_json, replace_file
from contradiff.watch import peak_memory


def flatten(content: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value in nested mappings; a list is one value."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def record_costs(root: Path, stage: str, params: Section, *, seconds: float) -> None:
    """Write the record of a stage that this process has run from its beginning to its end."""
    content = {
        "stage": stage,
        "params": dict(flatten(params.model_dump(mode="json", by_alias=True))),
        "ended": time.time(),
        "seconds": round(seconds, 1),
        "memory_mb": round(peak_memory() / 1e6),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        content["gpu"] = torch.cuda.get_device_name()
        content["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    path = root / ".work/times" / f"{stage}-{key_of(stage, params=params, inputs=[])}.json"
    with replace_file(path) as temporary:
        temporary.write_text(hide_passwords(json.dumps(content)), encoding="utf-8")


def read_costs(root: Path, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the newest record of each stage that ran with the values of `params`.

    `params` is the content of params.yaml. A stage that never ran to its end in one go is missing.
    """
    flat = json.loads(hide_passwords(json.dumps(dict(flatten(params)))))
    found: dict[str, dict[str, Any]] = {}
    for path in (root / ".work/times").glob("*.json"):
        remedy = "delete this file; it only has times"
        record = read_json(path, remedy=remedy)
        with explain_damage(path, remedy=remedy):
            is_same = all(flat.get(key) == value for key, value in record["params"].items())
            if is_same and record["ended"] >= found.get(record["stage"], {}).get("ended", 0.0):
                found[record["stage"]] = record
    return dict(sorted(found.items()))
