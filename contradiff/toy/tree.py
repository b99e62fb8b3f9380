"""A small drawn ImageNet: twelve classes of objects before natural-looking backgrounds.

The tree has the layout of ImageNet's classification task as it is unpacked from Kaggle, so that
one reader serves both. A class has *tendencies* in outline, colour and background, none of which
determines it, and every image varies in position, scale, rotation and light, and sometimes shows
a distractor or an occluder. Objects are large and backgrounds soft, since a first stage with f = 4
leaves a 32-pixel image only 8 x 8 latent cells.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from contradiff.files import replace_dir
from contradiff.toy.classes import CLASSES
from contradiff.toy.render import render_image

JPEG_QUALITY = 92
MAPPING_NAME = "LOC_synset_mapping.txt"
_SPLIT_IDS = {"train": 0, "val": 1}


def _write_image(
    path: Path, *, split: str, class_index: int, index: int, image_size: int, seed: int
) -> None:
    # Every image has a stream of its own, so that its bytes do not depend on the others.
    rng = np.random.default_rng([seed, _SPLIT_IDS[split], class_index, index])
    image = Image.fromarray(render_image(class_index, rng, image_size=image_size))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="JPEG", quality=JPEG_QUALITY, optimize=True, subsampling=0)


def _check_replaceable(root: Path, mapping: str) -> None:
    """Refuse to replace a folder that this module did not write: real data would be lost."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    own = root / MAPPING_NAME
    if not own.is_file() or own.read_text(encoding="utf-8", errors="replace") != mapping:
        raise ValueError(
            f"{root}: holds something other than the toy images, which would replace it; set "
            f"data.source to imagefolder to read it, or data.root to another folder"
        )


def render_tree(
    root: Path,
    *,
    num_train: int,
    num_val: int,
    image_size: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the drawn ImageNet, which replaces `root` when it is whole.

    It holds `train/<wnid>/<wnid>_<number>.JPEG`, `val/<wnid>/ILSVRC2012_val_<number>.JPEG` and
    `LOC_synset_mapping.txt`. In both splits the classes' sizes differ by one at most. An image's
    pixels depend on the seed, its split, its class and its number within that class only, so a
    larger split begins with the images of a smaller one.

    Args:
        root: The folder to write; an earlier one of the same kind is replaced.
        num_train: Number of training images.
        num_val: Number of validation images, drawn from streams of their own.
        image_size: Side of the square images, in pixels.
        seed: Seed of all chance, not negative.
        on_progress: Called after every image with the number written so far.

    Raises:
        ValueError: a split is too small for every class to have an image, or `root` holds
            something else.
    """
    for name, number in (("num_train", num_train), ("num_val", num_val)):
        if number < len(CLASSES):
            raise ValueError(
                f"data.{name} is {number}, but each of the {len(CLASSES)} toy classes needs an "
                f"image: set it to {len(CLASSES)} or more"
            )
    mapping = "".join(f"{toy_class.wnid} {toy_class.name}\n" for toy_class in CLASSES)
    _check_replaceable(root, mapping)
    written = 0
    with replace_dir(root) as temporary:
        for split, number in (("train", num_train), ("val", num_val)):
            for position in range(number):
                index, class_index = divmod(position, len(CLASSES))
                wnid = CLASSES[class_index].wnid
                name = (
                    f"{wnid}_{index}.JPEG"
                    if split == "train"
                    else f"ILSVRC2012_val_{position + 1:08d}.JPEG"
                )
                _write_image(
                    temporary / split / wnid / name,
                    split=split,
                    class_index=class_index,
                    index=index,
                    image_size=image_size,
                    seed=seed,
                )
                written += 1
                if on_progress is not None:
                    on_progress(written)
        (temporary / MAPPING_NAME).write_text(mapping, encoding="utf-8")
