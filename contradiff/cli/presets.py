"""Presets: full parameter files in presets/, one of which becomes params.yaml."""

import shutil
from pathlib import Path

from contradiff.files import replace_file

FOLDER, PARAMS = Path("presets"), Path("params.yaml")


def preset_names() -> list[str]:
    """Return the names of the presets of the project in the present folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def use_preset(name: str) -> list[str]:
    """Copy a preset to params.yaml, and return lines that say what was done.

    A params.yaml that is no preset is first copied to params.yaml.bak. Raises ValueError if there
    is no such preset.
    """
    names = preset_names()
    if not names:
        raise ValueError(f"{FOLDER}/: no presets here; go to the root of the project")
    if name not in names:
        raise ValueError(f"NAME: {name!r} is no preset; it is one of: {', '.join(names)}")
    said = keep_params()
    preset = FOLDER / f"{name}.yaml"
    with replace_file(PARAMS) as temporary:
        shutil.copyfile(preset, temporary)
    return [*said, f"{PARAMS} is now {preset}"]


def keep_params() -> list[str]:
    """Copy a params.yaml that is no preset to params.yaml.bak, and return a line that says so."""
    known = {path.read_bytes() for path in FOLDER.glob("*.yaml")}
    if not PARAMS.exists() or PARAMS.read_bytes() in known:
        return []
    backup = PARAMS.with_name(f"{PARAMS.name}.bak")
    with replace_file(backup) as temporary:
        shutil.copyfile(PARAMS, temporary)
    return [f"{PARAMS} differs from all presets; saved a copy as {backup}"]
