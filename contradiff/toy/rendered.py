"""Renders the images and digits of the embedded default, if their folder is missing.

The folder's name is a hash of the renderer's source code and settings (the "recipe"), so that
experiments with different seeds can run at the same time. Only the stage `prepare` renders.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from contradiff.data.params import DataParams
from contradiff.files import hold_lock, replace_file, sha256_of

RECIPE_NAME = ".rendered.json"
"""Name of the file with a folder's recipe. Only complete folders have this file."""
DIGITS_PER_CLASS = 60
"""Number of training digits per class. All other digits are test images."""


def ensure_images(
    root: Path, params: DataParams, *, seed: int, on_progress: Callable[[int], None]
) -> Path:
    """Return the folder of toy images in `root`; render the images if the folder is missing.

    `on_progress` is called with the number of images rendered since its last call. Raises
    ValueError if a split has fewer images than classes.
    """
    from contradiff.toy.tree import render_tree

    settings = {"num_train": params.num_train or 0, "num_val": params.num_val or 0}
    settings |= {"image_size": params.image_size, "seed": seed}
    return _ensure(root, "*.py", settings, partial(render_tree, on_progress=on_progress))


def ensure_digits(root: Path, *, seed: int) -> Path:
    """Return the folder of scikit-learn's digits in `root`; write the digits if it is missing."""
    from contradiff.toy.digits import write_digits

    settings = {"num_train_per_class": DIGITS_PER_CLASS, "seed": seed}
    return _ensure(root, "digits.py", settings, write_digits)


def _ensure(
    root: Path, pattern: str, settings: dict[str, int], render: Callable[..., None]
) -> Path:
    """Return the folder for `settings` and the source files `pattern`; render if it is missing."""
    digests = [sha256_of(path) for path in sorted(Path(__file__).parent.glob(pattern))]
    recipe = {"renderer": hashlib.sha256("".join(digests).encode()).hexdigest(), **settings}
    text = json.dumps(recipe, sort_keys=True)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:12]
    with hold_lock(root / ".lock"):
        if not (folder / RECIPE_NAME).is_file():
            render(folder, **settings)
            with replace_file(folder / RECIPE_NAME) as path:
                path.write_text(text)
    return folder
