"""The commands of `contradiff`. Each reads its options, calls the library, and prints."""

import json
import os
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from contradiff.cli.demo import check_gradio, load_exhibit
from contradiff.cli.images import (
    compute_features,
    features_file,
    for_each_image,
    list_images,
    samples_files,
)
from contradiff.cli.options import (
    AsJson,
    Base,
    BatchSize,
    Device,
    Folder,
    Images,
    Model,
    Revision,
    check_project,
    load_model,
    one_of,
)
from contradiff.cli.presets import preset_file, preset_names, use_preset
from contradiff.cli.progress import progress_bar, say, status
from contradiff.cli.studies import study
from contradiff.files import describe_bytes
from contradiff.planning.costs import GPUS

FAILED, SKIPPED = 1, 3
EXIT_CODES = """Exit codes:

0    done

1    failed; no file is half-written

2    a wrong option or argument

3    done, except for some images that cannot be read

130  stopped by Ctrl-C"""


class _Commands(TyperGroup):
    """Turns the library's errors for users into one line and an exit code.

    With CONTRADIFF_TRACEBACK=1, they are shown in full.
    """

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        for option in command.params if command else ():
            if getattr(option, "is_flag", False):
                option.metavar = ""  # typer's own is "<bool>", but a flag takes no value
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `contradiff … | head`
            raise
        except (ValueError, OSError, RuntimeError) as error:
            is_full = type(error).__name__ == "OutOfMemoryError"  # torch's, without its import
            is_other = isinstance(error, RuntimeError) and not is_full
            if is_other or os.environ.get("CONTRADIFF_TRACEBACK") == "1":
                raise
            remedy = "the GPU's memory is full; set a smaller --batch-size, or --device cpu"
            say(f"contradiff: {remedy if is_full else error}")
            raise typer.Exit(FAILED) from error


def _examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *(f"  contradiff {line}" for line in lines)])


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


def _version(value: bool | None) -> None:
    if value:
        import contradiff

        typer.echo(contradiff.__version__)
        raise typer.Exit


@app.callback()
def contradiff(
    *,
    version: Annotated[  # noqa: ARG001
        bool | None,
        typer.Option(
            "--version", callback=_version, is_eager=True, metavar="", help="Print the version."
        ),
    ] = None,
) -> None:
    """Features, classes and images from a trained ContraDiff.

    The model is what the pipeline has trained in the present folder, or the one that --model names.
    `contradiff COMMAND --help` shows examples.
    """
    # An image beyond twice this limit is refused; below that, its size is no fault.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")


def _end(num_skipped: int) -> None:
    if num_skipped:
        raise typer.Exit(SKIPPED)


@app.command(
    epilog=_examples(
        "embed photos",
        "embed photos -o photos.npy       (and photos.csv with names and labels)",
        "embed photos -o photos.parquet   (one file; needs pyarrow)",
        "embed photos --model user/name --device cuda --batch-size 64",
    )
)
def embed(
    folder: Folder,
    *,
    output: Annotated[
        Path,
        typer.Option(
            *("--output", "-o"),
            dir_okay=False,
            metavar="FILE",
            callback=one_of(".parquet", ".npy"),
            help="A file whose name ends in .parquet or .npy.",
        ),
    ] = Path("features.npy"),
    model: Model = None,
    revision: Revision = None,
    base: Base = None,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    """Write the feature of each image in a folder to a file.

    Names are paths below the folder. If its images are in folders, the first of them is the label.
    """
    files = list_images([folder], name="FOLDER")
    with features_file(output) as write:
        network = load_model(model, revision, base, device)
        found, features = compute_features(network, files, batch_size=batch_size)
        names = [file.relative_to(folder).as_posix() for file in found.files]
        write(names, features)
    typer.echo(f"{output}: {len(names)} images, {network.width} values each")
    _end(found.num_skipped)


@app.command(
    epilog=_examples(
        "classify a.jpg b.jpg",
        "classify photos --top 1",
        "classify a.jpg --json --model user/name",
    )
)
def classify(
    images: Images,
    *,
    top: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many classes of each image.")
    ] = 5,
    as_json: AsJson = False,
    model: Model = None,
    revision: Revision = None,
    base: Base = None,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    """Print the most probable classes of images."""
    files = list_images(images, name="IMAGE")
    network = load_model(model, revision, base, device)

    def call(*args: Any, **options: Any) -> Sequence[Any]:
        return network.classify(*args, top=top, **options)

    found = for_each_image(network, files, call, text="Classes", batch_size=batch_size)
    pairs = [
        (str(file), list(zip(each.classes, each.probabilities, strict=True)))
        for file, each in zip(found.files, found.values, strict=True)
    ]
    _print_pairs(pairs, keys=("image", "classes", "class", "probability"), as_json=as_json)
    _end(found.num_skipped)


@app.command(
    epilog=_examples(
        "generate -n 16 --grid grid.png",
        "generate -n 8 --condition a.jpg --guidance 2 -o like-a",
        "generate -n 8 --class ring --seed 1",
    )
)
def generate(
    *,
    number: Annotated[
        int, typer.Option("--number", "-n", min=1, metavar="N", help="How many images.")
    ] = 16,
    condition: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="IMAGE",
            help="An image to vary. Repeat the option for several, which take turns.",
        ),
    ] = None,
    class_name: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="NAME",
            help="A class to show. Repeat the option for several, which take turns.",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="SCALE", help="How closely to follow the condition; 1: no guidance."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many denoising steps.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Another seed, other images.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", file_okay=False, metavar="FOLDER", help="A new folder for the images."
        ),
    ] = Path("samples"),
    grid: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            metavar="FILE",
            callback=one_of(".png"),
            help="Also write one PNG with all images.",
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    base: Base = None,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    """Make images: unconditional, variations of an image, or of a class.

    What is not given is as in the setting that the model was measured with.
    """
    if condition and class_name:
        raise typer.BadParameter("give either --condition or --class, not both")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: the folder is not empty; choose a new one with -o")
    with samples_files(output, grid) as write:
        network = load_model(model, revision, base, device)
        for name in class_name or ():
            if name not in network.class_names:
                near = get_close_matches(name, network.class_names, cutoff=0)
                raise ValueError(f"--class: no class is named {name!r}; near are {', '.join(near)}")
        with progress_bar("Images", total=number) as advance:
            images = network.generate(
                number,
                condition=condition or class_name,
                guidance=guidance,
                num_inference_steps=steps,
                seed=seed,
                batch_size=batch_size,
                on_progress=advance,
            )
        write(images)
    typer.echo(f"{output}: {number} images{f'; {grid}: all of them' if grid else ''}")


@app.command(epilog=_examples("neighbours a.jpg photos", "neighbours a.jpg photos -k 20 --json"))
def neighbours(
    image: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, metavar="IMAGE", help="An image.")
    ],
    folder: Folder,
    *,
    k: Annotated[int, typer.Option("-k", min=1, metavar="N", help="How many neighbours.")] = 5,
    as_json: AsJson = False,
    model: Model = None,
    revision: Revision = None,
    base: Base = None,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    """Print the images of a folder whose features are nearest to an image's.

    The number is the cosine of the angle between the features: 1 is the same direction.
    """
    own = image.resolve()
    files = [file for file in list_images([folder], name="FOLDER") if file.resolve() != own]
    if not files:
        raise ValueError(f"FOLDER: {folder} has no images besides {image}")
    network = load_model(model, revision, base, device)
    query = network.features(image)
    found, features = compute_features(network, files, batch_size=batch_size)
    from torch import cosine_similarity

    best = cosine_similarity(query, features).topk(min(k, len(found.files)))
    nearest = [
        (str(found.files[place]), value)
        for place, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    keys = ("image", "neighbours", "image", "cosine")
    _print_pairs([(str(image), nearest)], keys=keys, as_json=as_json)
    _end(found.num_skipped)


@app.command(
    epilog=_examples(
        "demo",
        "demo --model mine --images photos",
        "demo --model with --model without   (two models, side by side)",
    )
)
def demo(
    *,
    models: Annotated[
        list[str] | None,
        typer.Option(
            *("--model", "-m"),
            help="The folder of an exported model, or its id on the Hugging Face hub. Several are "
            "shown side by side. Without it: what the pipeline has trained here, in build/.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A folder of images, in which the page finds the nearest ones. Without it: the "
            "project's validation images.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of denoising steps. Fewer are quicker.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Left out: the first free one from 7860."),
    ] = None,
    revision: Revision = None,
    base: Base = None,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    """Show the model in a browser: what it says about an image that you drop on a page.

    The page has classes, nearest images, variations, and what the model reads. Only this computer
    can open it, and it sends nothing elsewhere. Ctrl-C ends it.
    """
    check_gradio()
    if len(set(models or ())) < len(models or ()):
        raise typer.BadParameter("--model: name each model once")
    if port is not None:
        from contradiff.demo.server import check_port

        check_port(port)
    exhibits = [
        load_exhibit(model, revision, base, device, images, steps=steps, batch_size=batch_size)
        for model in models or [None]
    ]
    from contradiff.demo.server import serve

    with serve(exhibits, port=port) as address:
        typer.echo(f"{address}   (open it in a browser; Ctrl-C ends it)")
        Event().wait()


@app.command(
    epilog=_examples("export mine", "export mine --with-base", "export mine --push user/name")
)
def export(
    folder: Annotated[
        Path,
        typer.Argument(
            file_okay=False, metavar="FOLDER", help="A new folder, or an earlier export to replace."
        ),
    ],
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Copy the base model too.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Upload it to the Hugging Face hub, as user/name."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Only you see what --push uploads.")
    ] = False,
    licence: Annotated[
        str, typer.Option(metavar="NAME", help="The licence in the model card, such as apache-2.0.")
    ] = "other",
) -> None:
    """Write the model that was trained here, for others: safetensors and a model card."""
    check_project(option="")
    if private and push is None:
        raise typer.BadParameter("--private has no effect without --push")
    with status("Writing the export"):
        from contradiff import export as write

        address = write(folder, push_to=push, private=private, with_base=with_base, licence=licence)
    typer.echo(f"{folder}: {describe_bytes(_size_of(folder))}")
    base = "" if with_base else " --base build/base"
    typer.echo(address or f"Try it: contradiff generate --model {folder}{base}")


@app.command(epilog=_examples("info", "info --json", "info --model user/name"))
def info(*, as_json: AsJson = False, model: Model = None, revision: Revision = None) -> None:
    """Say which model this is: its base, its classes, its scores, and what is in build/."""
    if model is None:
        check_project()
    with status("Reading the model"):
        from contradiff.pretrained import hub
        from contradiff.pretrained.folder import read_export_config
        from contradiff.pretrained.project import read_project

        if model is None:
            config = read_project(Path()).config
        else:
            config = read_export_config(hub.find_model(model, revision=revision))
    folders = sorted(path for path in Path("build").glob("*") if path.is_dir())
    cached = {} if model else {str(path): _size_of(path) for path in folders}
    content: dict[str, Any] = {
        "base": config.base.model_dump(),
        "image_size": config.image_size,
        "classes": config.class_names,
        "steps": config.training["num_steps"],
        "parts": sorted(config.parts),
        "scores": config.scores,
        "cached": cached,
    }
    if as_json:
        typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
        return
    names = config.class_names
    shown = ", ".join(names[:12]) + ", …" * (len(names) > 12)
    revision_of_base = f" at {config.base.revision}" if config.base.revision else ""
    lines = [
        ("base", f"{config.base.path}{revision_of_base}"),
        ("", f"unet's sha256 {config.base.sha256['unet']}"),
        ("images", f"{config.image_size} x {config.image_size} pixels"),
        ("classes", f"{len(names)}: {shown}"),
        ("trained", f"{config.training['num_steps']} steps"),
        ("parts", ", ".join(sorted(config.parts))),
        *((row[0], "  ".join(row[1:])) for row in config.scores),
        *((name, describe_bytes(size)) for name, size in cached.items()),
    ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        typer.echo(f"{name:{width}}  {text}")


@app.command(epilog=_examples("preset paper", "preset own --data photos"))
def preset(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            autocompletion=lambda: [*preset_names(), "own"],
            help=f"{', '.join(preset_names())}, or own, which is fitted to your images.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For the preset own: the folder of your images."),
    ] = None,
) -> None:
    """Write a preset to params.yaml in this folder, for the pipeline or for `contradiff plan`.

    A params.yaml that is no preset is kept as params.yaml.bak.
    """
    for line in use_preset(name, data):
        typer.echo(line)


@app.command(
    epilog=_examples(
        "plan --preset paper --gpus 4",
        "plan --preset paper --gpus 8 --gpu a100 --gpu-memory 40",
        "plan --gpu rtx4090 --images 20000   (for the params.yaml in this folder)",
    )
)
def plan(
    *,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", autocompletion=preset_names, help="A preset. Without it: params.yaml."
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="Number of GPUs.")] = 1,
    gpu: Annotated[
        str,
        typer.Option(metavar="NAME", autocompletion=lambda: list(GPUS), help=f"{', '.join(GPUS)}."),
    ] = "h100",
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=1, metavar="GB", help="Memory of each GPU, if it is not as usual."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Training images. Without it: counted if data.root is there, or else assumed.",
        ),
    ] = None,
) -> None:
    """Show hours, disk and GPU memory of every stage, before you begin.

    The plan names the rates behind the hours. The exit code is 1 if a stage does not fit a GPU;
    the plan then names the parameter that makes it fit.
    """
    from contradiff.planning.plan import plan_of

    path = preset_file(preset, key="--preset") if preset else Path("params.yaml")
    found = plan_of(path, num_gpus=gpus, gpu=gpu, gpu_memory=gpu_memory, num_images=images)
    typer.echo(f"{path.name}\n\n{found}")
    if found.misfits:
        raise typer.Exit(1)


app.command(
    epilog=_examples(
        "study",
        "study table8 --dry-run",
        "study table8 --run -j 2",
        "study table8 --report",
        "study table8 --slurm jobs   (then `sbatch` each of the files)",
    )
)(study)


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _print_pairs(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]],
    *,
    keys: tuple[str, str, str, str],
    as_json: bool,
) -> None:
    """Print for each row its name, then its pairs of a name and a number."""
    if as_json:
        title, many, key, value = keys
        content = [
            {title: name, many: [{key: text, value: number} for text, number in pairs]}
            for name, pairs in rows
        ]
        typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
        return
    for name, pairs in rows:
        typer.echo(name)
        for text, number in pairs:
            typer.echo(f"  {number:6.3f}  {text}")
