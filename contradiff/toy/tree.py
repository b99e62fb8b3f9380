"""The toy ImageNet: JPEGs of twelve classes, in folders that a reader of ImageNet can read.

Colours and backgrounds are typical of a class but not unique to it, so neither alone decides the
class. Images vary in position, scale, rotation and light. Some show a distractor or an occluder.
Objects are large and backgrounds smooth, because the VAE (factor 4) encodes a 32-pixel image as
only 8 x 8 latents.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from contradiff.files import replace_dir
from contradiff.toy.classes import CLASSES
from contradiff.toy.render import render_image


def render_tree(
    root: Path,
    *,
    num_train: int,
    num_val: int,
    image_size: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the toy ImageNet to `root`. Toy images from an earlier call are replaced at the end.

    The files are `train/<wnid>/<wnid>_<number>.JPEG`, `val/<wnid>/ILSVRC2012_val_<number>.JPEG` and
    `LOC_synset_mapping.txt`. The sizes of a split's classes differ by at most one image. An image
    depends only on the seed, the split, the class and its number in the class. Raising `num_train`
    or `num_val` only adds images. `on_progress` is called with 1 for every image.

    Raises:
        ValueError: A split has fewer images than there are classes, or `root` has other files.
    """
    splits = {"train": num_train, "val": num_val}
    for split, number in splits.items():
        if number < len(CLASSES):
            raise ValueError(
                f"data.num_{split} is {number}, but each of the {len(CLASSES)} toy classes needs "
                f"an image; set data.num_{split} to {len(CLASSES)} or more"
            )
    mapping = "".join(f"{toy_class.wnid} {toy_class.name}\n" for toy_class in CLASSES)
    own = root / "LOC_synset_mapping.txt"
    is_own = own.is_file() and own.read_text(encoding="utf-8", errors="replace") == mapping
    if not is_own and (root.is_file() or (root.is_dir() and any(root.iterdir()))):
        raise ValueError(
            f"{root} contains files that are not the toy images, and rendering would delete them. "
            "To read these files, set data.source to imagefolder. To render, set data.root to "
            "another folder"
        )
    with replace_dir(root) as temporary:
        for split_id, (split, number) in enumerate(splits.items()):
            for position in range(number):
                index, class_index = divmod(position, len(CLASSES))
                wnid = CLASSES[class_index].wnid
                is_train = split == "train"
                name = f"{wnid}_{index}" if is_train else f"ILSVRC2012_val_{position + 1:08d}"
                path = temporary / split / wnid / f"{name}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                # Each image has its own generator and does not depend on other images.
                rng = np.random.default_rng([seed, split_id, class_index, index])
                image = Image.fromarray(render_image(class_index, rng, image_size=image_size))
                image.save(path, "JPEG", quality=92, optimize=True, subsampling=0)
                on_progress(1)
        (temporary / own.name).write_text(mapping, encoding="utf-8")
