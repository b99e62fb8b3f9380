"""validate: check all of params.yaml before any other stage runs, and write build/validated.

Other stages read only their own sections, so they would not notice a mistyped section.
build/validated always has the same content, so DVC does not repeat other stages after this one.
"""

from stages.runtime.run import PARAMS_FILE, Run, RuntimeParams, execute, say_how_to_restore_params

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
    with say_how_to_restore_params():
        check(read_params(PARAMS_FILE), source=str(PARAMS_FILE), run=run)
    with replace_file(Path("build/validated")) as temporary:
        temporary.write_text("params.yaml is valid\n", encoding="utf-8")


def describe(_params: Params) -> str:
    content = read_params(PARAMS_FILE)
    check(content, source=str(PARAMS_FILE))
    return f"{PARAMS_FILE}: {len(content)} sections are valid"


def check(content: Mapping[str, Any], *, source: str, run: Run | None = None) -> None:
    """Raise ValueError, with a line for each fault, if the parameters are not valid.

    With a `run`, also compare the parameters with the base. Skip this if the hub is not reachable,
    or if the file alone shows a fault: the message then comes without the import of diffusers.
    """
    params = parse_exactly(WholeFile, content, source=source)
    faults = list(rules.between_sections(params))
    if run is not None and not faults:
        try:
            faults += rules.with_base(params, config_folder(params.base, root=run.root))
        except ConnectionError as error:
            run.log(f"the parameters could not be checked against the base: {error}")
        except ValueError as error:
            faults += str(error).splitlines()
    if faults:
        raise ValueError("\n".join(f"{source}: {fault}" for fault in faults))


if __name__ == "__main__":
    execute(Params, main)
