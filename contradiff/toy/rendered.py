"""The embedded default's data: rendered once for each recipe, into a folder named by the recipe.

So experiments with different seeds run side by side. Only the stage `prepare` renders; it writes
the folder's name into the manifests that later stages read.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from contradiff.data.params import DataParams
from contradiff.files import hold_lock, replace_file, sha256_of

RECIPE_NAME = ".rendered.json"
"""What a folder was rendered from. It is written last, so only a whole folder has it."""
DIGITS_PER_CLASS = 60
"""Training pool of the digits, from which 25-shot splits are drawn; all others are for testing."""


def ensure_images(
    root: Path, params: DataParams, *, seed: int, on_progress: Callable[[int], None]
) -> Path:
    """Return the folder of toy images below `root`; render it if it is not there.

    `on_progress` gets the number of images rendered since the last call. It raises ValueError if
    there are fewer images than classes.
    """
    from contradiff.toy.tree import render_tree

    settings = {"num_train": params.num_train or 0, "num_val": params.num_val or 0}
    settings |= {"image_size": params.image_size, "seed": seed}
    return _ensure(root, "*.py", settings, partial(render_tree, on_progress=on_progress))


def ensure_digits(root: Path, *, seed: int) -> Path:
    """Return the folder of scikit-learn's digits below `root`; write it if it is not there."""
    from contradiff.toy.digits import write_digits

    settings = {"num_train_per_class": DIGITS_PER_CLASS, "seed": seed}
    return _ensure(root, "digits.py", settings, write_digits)


def _ensure(
    root: Path, pattern: str, settings: dict[str, int], render: Callable[..., None]
) -> Path:
    """Render with this room's files of the pattern: a changed renderer renders anew."""
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
