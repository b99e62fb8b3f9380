"""Notes how long stages take, and how much memory they need, in .work/times."""

from stages.runtime.passwords import hide_passwords
from stages.runtime.work_dir import key_of

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contradiff.config import Section, flatten
from contradiff.files import replace_file
from contradiff.planning.times import newest_notes, read_notes
from contradiff.watch import peak_memory


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
    """Return the newest note of each stage that ran with `params`, the content of params.yaml."""
    flat = json.loads(hide_passwords(json.dumps(dict(flatten(params)))))
    return newest_notes(read_notes(root), flat)
