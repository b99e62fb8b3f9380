"""Raw data where it lies: what the embedded default renders itself, and what a user brings."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contradiff.data.params import DataParams
from contradiff.files import file_manifest, hold_lock, replace_file, sha256_of
from contradiff.sources.cifar_files import find_cifar
from contradiff.sources.image_folder import ImageFolder
from contradiff.sources.transfer_set import Source, TransferDataParams, cifar_name

RECIPE_NAME = ".rendered.json"
"""What a rendered folder was rendered from, written last: only then is it whole."""

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
        "renderer": _code_digest("*.py"),
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
            from contradiff.toy.tree import render_tree

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
    """Return where the set is: `root`, or for the digits a folder below it, as for images.

    The digits are written; every other set must be there. CIFAR's archives are compared with their
    official checksums, unless `transfer_data.verify` is false.

    Raises:
        ValueError: files are missing, or an archive is not the official one; names
            transfer_data.root or the archive.
    """
    match params.source:
        case "digits":
            recipe = {"renderer": _code_digest("digits.py"), "seed": seed}
            folder = _folder_of(root, recipe)
            with hold_lock(root / ".lock"):
                if not _is_rendered(folder, recipe):
                    from contradiff.toy.digits import write_digits_archive

                    write_digits_archive(folder, num_train_per_class=DIGITS_PER_CLASS, seed=seed)
                    _mark_rendered(folder, recipe)
            return folder
        case "cifar10" | "cifar100":
            files = find_cifar(root, params.source, shown_root=params.root)
            if params.verify:
                files.verify()
            return root
        case "imagefolder":
            return root


def transfer_manifest(root: Path, *, source: Source, shown_root: str) -> dict[str, Any]:
    """What stands for the set in DVC: sizes and hashes of all that is read of it.

    Args:
        root: as `ensure_transfer_archive` returned it.
        source: `transfer_data.source`.
        shown_root: `transfer_data.root`.

    Raises:
        ValueError: files are missing.
    """
    if source == "imagefolder":
        folder = ImageFolder.scan(root, shown_root=shown_root)
        counts = {split: len(files) for split, files in folder.splits.items()}
        return {
            "root": shown_root,
            "classes": list(folder.class_names),
            "num_images": counts,
            "sha256": folder.digest(),
        }
    cifar = find_cifar(root, cifar_name(source), shown_root=shown_root)
    # all beside each other
    folder = cifar.paths[0].parent
    return {"root": shown_root, "files": file_manifest(folder, [path.name for path in cifar.paths])}


def read_manifest(path: Path) -> dict[str, Any]:
    """The JSON of `Manifest.write`.

    Raises:
        ValueError: the file is missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing; run `dvc repro prepare`")
    return json.loads(path.read_text())


def _folder_of(root: Path, recipe: dict[str, Any]) -> Path:
    text = json.dumps(recipe, sort_keys=True)
    return root / hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_rendered(root: Path, recipe: dict[str, Any]) -> bool:
    path = root / RECIPE_NAME
    return path.is_file() and json.loads(path.read_text()) == recipe


def _mark_rendered(root: Path, recipe: dict[str, Any]) -> None:
    with replace_file(root / RECIPE_NAME) as path:
        path.write_text(json.dumps(recipe))


def _code_digest(pattern: str) -> str:
    """Of the files of `contradiff.toy` that match a pattern."""
    folder = Path(__file__).parents[1] / "toy"
    digests = [sha256_of(path) for path in sorted(folder.glob(pattern))]
    assert digests, pattern
    return hashlib.sha256("".join(digests).encode()).hexdigest()
