"""scikit-learn's handwritten digits, stored in the layout of CIFAR-100's python archive.

The digits are 1797 real scans of 8 x 8 pixels, which need no download. In the embedded default,
they replace CIFAR-100 as the data set for transfer learning.
"""

import pickle  # noqa: TID251 - only writes our own arrays
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from contradiff.files import replace_dir

FINE_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32  # side of CIFAR's images, in pixels


def write_digits(root: Path, *, num_train_per_class: int, seed: int) -> None:
    """Write the digits as the files `train`, `test` and `meta` of cifar-100-python.

    The fine classes are the ten digits. The coarse classes are even and odd. `train` has
    `num_train_per_class` scans of each digit, and `test` has all others, both in random order. The
    name of an image ends with its index in `sklearn.datasets.load_digits`. Digits from an earlier
    call are replaced. Raises ValueError if `root` contains other files.

    *Deviation* from CIFAR's files: keys are text, because only Python 2 can write byte strings in
    this format. torchvision's reader accepts text too.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    assert 1 <= num_train_per_class < np.bincount(labels).min(), "each class needs a test image"
    names = {"fine_label_names": [*FINE_NAMES], "coarse_label_names": ["even", "odd"]}
    meta = pickle.dumps(names, protocol=2)
    is_empty = not root.exists() or (root.is_dir() and not any(root.iterdir()))
    own = root / "meta"
    if not is_empty and (not own.is_file() or own.read_bytes() != meta):
        fault = f"{root} contains files that are not the digits, and writing would delete them"
        read = "to read these files, set transfer_data.source to cifar100"
        write = "to write the digits, set transfer_data.root to another folder"
        raise ValueError(f"{fault}: {read}; {write}")
    order = np.random.default_rng(seed).permutation(len(labels))
    in_order = labels[order]
    # For each image in this order: how many images of the same class come before.
    rank = np.empty(len(labels), dtype=np.int64)
    for label in range(len(FINE_NAMES)):
        rank[in_order == label] = np.arange(np.count_nonzero(in_order == label))
    splits = {"train": rank < num_train_per_class, "test": rank >= num_train_per_class}
    with replace_dir(root) as temporary:
        (temporary / "meta").write_bytes(meta)
        for split, chosen in splits.items():
            fine, indices = in_order[chosen].tolist(), order[chosen].tolist()
            named = zip(fine, indices, strict=True)
            content = {
                "filenames": [f"{FINE_NAMES[label]}_s_{index:06d}.png" for label, index in named],
                "batch_label": f"{split}ing batch 1 of 1",
                "fine_labels": fine,
                "coarse_labels": [label % 2 for label in fine],
                "data": np.stack([_enlarged(np.asarray(pixels)[index]) for index in indices]),
            }
            (temporary / split).write_bytes(pickle.dumps(content, protocol=2))


def _enlarged(scan: Float64[np.ndarray, " 64"]) -> UInt8[np.ndarray, " _values"]:
    """Enlarge a scan (bicubic) and return a row of CIFAR: equal red, green and blue planes."""
    # A value of `load_digits` is from 0 to 16.
    grey = Image.fromarray(scan.reshape(8, 8).astype(np.float32) * np.float32(255 / 16))
    large = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    # Bicubic interpolation overshoots at edges.
    plane = np.rint(np.clip(large, 0, 255)).astype(np.uint8)
    return np.tile(plane.ravel(), 3)
