"""Presets: full parameter files, one of which becomes params.yaml."""

import shutil
from pathlib import Path

from contradiff.config import PRESETS
from contradiff.files import replace_file

PARAMS = Path("params.yaml")
OWN = "own"
TITLE = """# ContraDiff's parameters for the images in {}, from presets/{}.yaml.
# `make preset NAME=own DATA=...` wrote this file.
"""


def preset_names() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_file(name: str, *, key: str) -> Path:
    """Return the file of a preset; raises ValueError, with `key`, if there is no such preset."""
    if name not in (names := preset_names()):
        raise ValueError(f"{key}: {name!r} is no preset; type one of: {', '.join(names)}")
    return PRESETS / f"{name}.yaml"


def use_preset(name: str, data: Path | None = None) -> list[str]:
    """Write a preset to params.yaml here, and return lines that say what was done.

    The preset "own" is fitted to the images in the folder `data`. A params.yaml that is no preset
    is first copied to params.yaml.bak. Raises ValueError if there is no such preset, or if the
    folder has no images, or too few.
    """
    if (name == OWN) != (data is not None):
        typed = f"`contradiff preset {OWN} --data FOLDER`, or `make preset NAME={OWN} DATA=FOLDER`"
        raise ValueError(f"DATA: type {typed}; only {OWN} has DATA")
    if data is not None:
        from contradiff.planning.own_images import fit_own_images, rewritten

        own = fit_own_images(data, project=Path.cwd())
        text = preset_file(own.template, key="NAME").read_text(encoding="utf-8")
        text = TITLE.format(data, own.template) + rewritten(text, own.changes)
        more = own.messages
    else:
        text = preset_file(name, key="NAME").read_text(encoding="utf-8")
        more = (f"{PARAMS} is now presets/{name}.yaml",)
    said = _keep_params()
    with replace_file(PARAMS) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [*said, *more]


def _keep_params() -> list[str]:
    """Copy a params.yaml that is no preset to params.yaml.bak, and return a line that says so."""
    known = {path.read_bytes() for path in PRESETS.glob("*.yaml")}
    if not PARAMS.exists() or PARAMS.read_bytes() in known:
        return []
    backup = PARAMS.with_name(f"{PARAMS.name}.bak")
    with replace_file(backup) as temporary:
        shutil.copyfile(PARAMS, temporary)
    return [f"{PARAMS} differs from all presets; saved a copy as {backup}"]
