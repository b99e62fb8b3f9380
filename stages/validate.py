"""validate: params.yaml => build/validated, before any other stage.

DVC gives a stage only the sections that it names, so no other stage would see a mistyped section.
This stage depends on the whole file. Its out is a constant: it runs at every change, and makes no
other stage run.
"""

from stages.runtime.run import PARAMS_FILE, Run, RuntimeParams, execute

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contradiff import rules
from contradiff.base.config import config_folder
from contradiff.config import Section, parse_exactly, read_params
from contradiff.files import replace_file


class Params(Section):
    """Empty, because the stage reads the whole file."""


class WholeFile(rules.AllParams):
    runtime: RuntimeParams


def main(_params: Params, run: Run) -> None:
    content = read_params(PARAMS_FILE)
    check(content, source=str(PARAMS_FILE), run=run)
    with replace_file(Path("build/validated")) as temporary:
        temporary.write_text("params.yaml is valid\n", encoding="utf-8")


def describe(_params: Params) -> str:
    content = read_params(PARAMS_FILE)
    check(content, source=str(PARAMS_FILE))
    return f"{PARAMS_FILE}: {len(content)} sections are valid"


def check(content: Mapping[str, Any], *, source: str, run: Run | None = None) -> None:
    """Refuse a parameter file that some stage cannot use; the ValueError has a line for each fault.

    Only within a run is it checked against the base, unless the hub cannot be reached.
    """
    params = parse_exactly(WholeFile, content, source=source)
    faults = list(rules.between_sections(params))
    if run is not None:
        try:
            faults += rules.with_base(params, config_folder(params.base, root=run.root))
        except ConnectionError as error:
            run.log(f"the parameters are not checked against the base yet: {error}")
        except ValueError as error:
            faults += str(error).splitlines()
    if faults:
        raise ValueError("\n".join(f"{source}: {fault}" for fault in faults))


if __name__ == "__main__":
    execute(Params, main)
