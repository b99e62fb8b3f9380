"""Presets: full parameter files in presets/, one of which becomes params.yaml."""

import shutil
from pathlib import Path

from contradiff.files import replace_file

FOLDER, PARAMS = Path("presets"), Path("params.yaml")
OWN = "own"
TITLE = """# ContraDiff's parameters for the images in {}, from presets/{}.yaml.
# `make preset NAME=own DATA=...` wrote this file.
"""


def preset_names() -> list[str]:
    """Return the names of the presets of the project in the present folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def use_preset(name: str, data: Path | None = None) -> list[str]:
    """Write a preset to params.yaml, and return lines that say what was done.

    The preset "own" is fitted to the images in the folder `data`. A params.yaml that is no preset
    is first copied to params.yaml.bak. Raises ValueError if there is no such preset, or if the
    folder has no images, or too few.
    """
    names = preset_names()
    if not names:
        raise ValueError(f"{FOLDER}/: no presets here; go to the root of the project")
    if (name == OWN) != (data is not None):
        raise ValueError(f"DATA: type `make preset NAME={OWN} DATA=folder`; only {OWN} has DATA")
    if data is not None:
        from contradiff.planning.own_images import fit_own_images, rewritten

        own = fit_own_images(data, project=Path.cwd(), presets=FOLDER)
        text = (FOLDER / f"{own.template}.yaml").read_text(encoding="utf-8")
        text = TITLE.format(data, own.template) + rewritten(text, own.changes)
        more = (*own.messages, "`contradiff plan` shows what a run costs")
    elif name in names:
        preset = FOLDER / f"{name}.yaml"
        text, more = preset.read_text(encoding="utf-8"), (f"{PARAMS} is now {preset}",)
    else:
        raise ValueError(f"NAME: {name!r} is no preset; it is one of: {', '.join(names)}")
    said = _keep_params()
    with replace_file(PARAMS) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [*said, *more]


def _keep_params() -> list[str]:
    """Copy a params.yaml that is no preset to params.yaml.bak, and return a line that says so."""
    known = {path.read_bytes() for path in FOLDER.glob("*.yaml")}
    if not PARAMS.exists() or PARAMS.read_bytes() in known:
        return []
    backup = PARAMS.with_name(f"{PARAMS.name}.bak")
    with replace_file(backup) as temporary:
        shutil.copyfile(PARAMS, temporary)
    return [f"{PARAMS} differs from all presets; saved a copy as {backup}"]
