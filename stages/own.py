"""Write params.yaml for a folder of images: `make preset NAME=own DATA=path/to/folder`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from contradiff.cli.presets import keep_params
from contradiff.files import replace_file
from contradiff.planning.own_images import OwnPreset, fit_own_images, rewritten

PRESETS = Path("presets")


def write_own(folder: Path, destination: Path) -> tuple[OwnPreset, list[str]]:
    """Fit parameters to the images, and write them with a preset's comments.

    Returns the choice, and lines about a former params.yaml that is kept. Raises ValueError if the
    folder has no images, or too few.
    """
    own = fit_own_images(folder, project=Path.cwd(), presets=PRESETS)
    kept = keep_params()
    title = (
        f"# ContraDiff's parameters for the images in {folder}, from presets/{own.template}.yaml.\n"
        "# `make preset NAME=own DATA=...` wrote this file.\n"
    )
    text = (PRESETS / f"{own.template}.yaml").read_text(encoding="utf-8")
    with replace_file(destination) as temporary:
        temporary.write_text(title + rewritten(text, own.changes), encoding="utf-8")
    return own, kept


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not arguments[0]:
        print("type the folder: make preset NAME=own DATA=path/to/folder", file=sys.stderr)
        return 2
    try:
        own, kept = write_own(Path(arguments[0]), Path("params.yaml"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([*kept, *own.messages, "`python -m stages.plan` shows what a run costs"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
