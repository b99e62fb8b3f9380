"""Says which stage writes a file that another stage does not find."""

from pathlib import Path
from typing import Any

from contradiff.config import read_params

PIPELINE = Path("dvc.yaml")


def explain(error: Exception) -> str:
    """Return an error's message. If the pipeline writes the missing file, it says what to type."""
    name = error.filename if isinstance(error, FileNotFoundError) else None
    if not isinstance(name, str) or not PIPELINE.is_file():
        return str(error)
    path = Path(name)
    stages: dict[str, dict[str, Any]] = read_params(PIPELINE)["stages"]
    for stage, content in stages.items():
        for kind in ("outs", "metrics", "plots"):
            for entry in content.get(kind, []):
                out = entry if isinstance(entry, str) else next(iter(entry))
                if path.is_relative_to(out):
                    remedy = f"run `dvc repro {stage}`, or fetch it with `dvc pull {out}`"
                    return f"{path}: no such file; {remedy}"
    return str(error)
