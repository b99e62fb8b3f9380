"""Raw data where it lies: what the embedded default renders itself, and what a user brings."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contradiff.atomic import hold_lock, replace_file, sha256_of
from contradiff.data.cifar import TransferDataParams
from contradiff.data.imagenet import DataParams

RECIPE_NAME = ".rendered.json"
"""What a rendered folder was rendered from, written last: only then is it whole."""

ARCHIVE_FILES = ("train", "test", "meta")
DIGITS_PER_CLASS = 60
"""Training pool of the digits, from which several 25-shot splits are drawn; the rest is test."""


def ensure_images(
    root: Path, params: DataParams, *, seed: int, on_progress: Callable[[int], None] | None = None
) -> Path:
    """Return the raw tree, which is `root` itself, or for toy a rendered folder below it.

    Each rendering has a folder of its own, named by its recipe, so that experiments with different
    seeds may run side by side; what is there already is not rendered again.

    Args:
        root: where `data.root` is.
        params: section `data`.
        seed: of the rendered images.
        on_progress: told the number of images rendered since the last call.

    Raises:
        ValueError: there are too few images for the classes.
    """
    if params.source != "toy":
        return root
    assert params.num_train is not None
    assert params.num_val is not None
    recipe = {
        "renderer": _code_digest("toy.py"),
        "num_train": params.num_train,
        "num_val": params.num_val,
        "image_size": params.image_size,
        "seed": seed,
    }
    tree = _folder_of(root, recipe)
    done = 0

    def report(total: int) -> None:
        nonlocal done
        if on_progress is not None:
            on_progress(total - done)
        done = total

    with hold_lock(root / ".lock"):
        if not _is_rendered(tree, recipe):
            from contradiff.data.toy import render_tree

            render_tree(
                tree,
                num_train=params.num_train,
                num_val=params.num_val,
                image_size=params.image_size,
                seed=seed,
                on_progress=report,
            )
            _mark_rendered(tree, recipe)
    return tree


def ensure_transfer_archive(root: Path, params: TransferDataParams, *, seed: int) -> Path:
    """Return the archive's folder: `root`, or for the digits a folder below it, as for images.

    CIFAR-100 must be there.

    Raises:
        ValueError: files of the archive are missing; names transfer_data.root.
    """
    if params.source == "digits":
        recipe = {"renderer": _code_digest("digits.py"), "seed": seed}
        folder = _folder_of(root, recipe)
        with hold_lock(root / ".lock"):
            if not _is_rendered(folder, recipe):
                from contradiff.data.digits import write_digits_archive

                write_digits_archive(folder, num_train_per_class=DIGITS_PER_CLASS, seed=seed)
                _mark_rendered(folder, recipe)
        return folder
    missing = [name for name in ARCHIVE_FILES if not (root / name).is_file()]
    if missing:
        msg = (
            f"transfer_data.root: {params.root} lacks {', '.join(missing)}; unpack "
            "cifar-100-python.tar.gz there (nothing is downloaded)"
        )
        raise ValueError(msg)
    return root


def transfer_manifest(root: Path, *, shown_root: str) -> dict[str, Any]:
    """What stands for the archive in DVC: its files' sizes and sha256."""
    files = {
        name: {"num_bytes": (root / name).stat().st_size, "sha256": sha256_of(root / name)}
        for name in ARCHIVE_FILES
    }
    return {"root": shown_root, "files": files}


def _folder_of(root: Path, recipe: dict[str, Any]) -> Path:
    text = json.dumps(recipe, sort_keys=True)
    return root / hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_rendered(root: Path, recipe: dict[str, Any]) -> bool:
    path = root / RECIPE_NAME
    return path.is_file() and json.loads(path.read_text()) == recipe


def _mark_rendered(root: Path, recipe: dict[str, Any]) -> None:
    with replace_file(root / RECIPE_NAME) as path:
        path.write_text(json.dumps(recipe))


def _code_digest(name: str) -> str:
    return sha256_of(Path(__file__).with_name(name))
