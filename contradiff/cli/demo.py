"""What the demo page shows: models, and the images among which it finds the nearest ones."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from contradiff.cli.images import compute_features, label_of, list_images
from contradiff.cli.options import load_model
from contradiff.cli.progress import status

if TYPE_CHECKING:
    from contradiff.demo.answers import Exhibit
    from contradiff.pretrained.gallery import Gallery
    from contradiff.pretrained.model import ContraDiff


def check_gradio() -> None:
    """Raise ValueError if gradio is not installed."""
    if not find_spec("gradio"):
        raise ValueError("the page needs gradio; type `pip install -e '.[demo]'`")


def load_exhibit(
    name: str | None,
    revision: str | None,
    base: Path | None,
    device: str | None,
    images: Path | None,
    *,
    steps: int | None,
    batch_size: int | None,
) -> "Exhibit":
    """Load the model `name`, or the project's own, and the features of the images beside it.

    Raises ValueError if there is no such model, or if the folder `images` has no readable image.
    """
    model = load_model(name, revision, base, device)
    from contradiff.demo.answers import Exhibit

    if images is not None:
        gallery: Gallery | str = _folder_gallery(model, images, batch_size=batch_size)
    elif name is None:
        with status("Reading the validation images"):
            gallery = _project_gallery(model)
    else:
        gallery = "To see them, start the page with a folder of images: --images FOLDER"
    return Exhibit(name or "build/pretrain", model, gallery, steps)


def _project_gallery(model: "ContraDiff") -> "Gallery | str":
    """Return the project's validation images, or in words why there are none."""
    from contradiff.pretrained.gallery import validation_gallery

    try:
        return validation_gallery(Path(), model.class_names)
    except ValueError as error:
        return f"{error}; or start the page with --images FOLDER"


def _folder_gallery(model: "ContraDiff", folder: Path, *, batch_size: int | None) -> "Gallery":
    from contradiff.pretrained.gallery import Gallery

    files = list_images([folder], name="--images")
    found, features = compute_features(model, files, batch_size=batch_size)
    names = [file.relative_to(folder).as_posix() for file in found.files]
    captions = [label_of(name) or name for name in names]

    def read(places: Sequence[int]) -> list[Path]:
        return [found.files[place] for place in places]

    return Gallery(f"images in {folder}", captions, features, read)
