"""Options that several commands take, and the model that they name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from contradiff.cli.progress import status

if TYPE_CHECKING:
    from contradiff.pretrained.model import ContraDiff


def _device(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not cpu, cuda or a numbered GPU such as cuda:1")
    return value


def one_of(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """Return a callback for an option: its file name must have one of the suffixes."""

    def check(value: Path | None) -> Path | None:
        if value is not None and value.suffix not in suffixes:
            raise typer.BadParameter(f"{value}: the name must end in {' or '.join(suffixes)}")
        return value

    return check


Images: TypeAlias = Annotated[
    list[Path],
    typer.Argument(exists=True, metavar="IMAGE", help="Images, or folders of images."),
]
Folder: TypeAlias = Annotated[
    Path,
    typer.Argument(
        exists=True,
        file_okay=False,
        metavar="FOLDER",
        help="A folder with images in it, or in folders below it.",
    ),
]
Model: TypeAlias = Annotated[
    str | None,
    typer.Option(
        *("--model", "-m"),
        metavar="MODEL",
        help="The folder of an exported model, or its id on the Hugging Face hub, such as "
        "user/name. Without it: what the pipeline has trained here, in build/.",
    ),
]
Revision: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the hub.")
]
Base: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        metavar="FOLDER",
        help="The folder of the base model, if it is neither in the export nor on the hub.",
    ),
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        callback=_device,
        metavar="NAME",
        help="cpu, cuda or cuda:1. Without it: a GPU if there is one.",
    ),
]
BatchSize: TypeAlias = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Images at a time. Fewer take less memory.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def check_project(
    *, option: str = "; or name one with --model FOLDER, or --model user/name"
) -> None:
    """Raise ValueError if the pipeline in the present folder has trained no model."""
    if not Path("build/pretrain/config.json").is_file():
        how = "in the project's folder, type `make repro` to train one, or `dvc pull` to fetch it"
        raise ValueError(f"build/pretrain: there is no trained model here; {how}{option}")


def load_model(
    model: str | None, revision: str | None, base: Path | None, device: str | None
) -> "ContraDiff":
    """Load what `--model` names, or what the pipeline in the present folder has trained.

    Raises ValueError if there is none, and as `ContraDiff.from_pretrained` does.
    """
    if model is None:
        if revision or base:
            name = "--revision" if revision else "--base"
            raise typer.BadParameter(f"{name} has no effect without --model")
        check_project()
    with status("Loading the model"):
        from contradiff import ContraDiff

        if model is None:
            return ContraDiff.from_project(device=device)
        return ContraDiff.from_pretrained(model, revision=revision, base=base, device=device)
