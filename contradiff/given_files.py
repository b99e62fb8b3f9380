"""Files that a user gives, as DVC sees them: sizes and hashes stand for what lies outside it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from contradiff.files import sha256_of


def file_manifest(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and sha256 of some files of a folder, by name."""
    files = {name: folder / name for name in sorted(names)}
    return {
        name: {"num_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in files.items()
    }
