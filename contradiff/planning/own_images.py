"""Parameters for a folder of your own images: counted, fitted, and laid out as the sources read it.

A folder may have `train/<class>/` and `val/<class>/`, only `<class>/`, or images alone, without
labels. If it has no `val/`, links to the images are arranged in data/raw/own: every tenth image of
a class is for validation.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from contradiff.config import PRESETS, parse, read_params
from contradiff.files import replace_dir
from contradiff.sources.counts import CountParams, count_faults
from contradiff.sources.folder import images_in, scan_folder
from contradiff.sources.listing import Listing, is_folder

LINKS = Path("data/raw/own")
NO_CLASS = "all"
"""The only class of images without labels."""
PHOTOGRAPH_SIDE = 128
"""Images whose median shorter side is smaller get the tiny base (32 pixels)."""
NUM_MEASURED = 200
NUM_INCEPTION = 2048
"""Features of Inception: FID needs as many images."""
IMAGES_SEEN = 1_000_000
"""Images that pretraining on Stable Diffusion sees in all epochs: the hours of single-gpu.yaml."""


@dataclass(frozen=True)
class OwnPreset:
    """The preset to begin with, the dotted keys to change, and what the user should know."""

    template: str
    changes: dict[str, Any]
    messages: tuple[str, ...]


def fit_own_images(folder: Path, *, project: Path) -> OwnPreset:
    """Count and measure the images in `folder`, and choose parameters for them.

    Raises ValueError if the folder has no images, or too few for the pipeline.
    """
    folder = folder.expanduser().resolve()
    if not is_folder(folder):
        raise ValueError(f"DATA: there is no folder {folder}; type the folder of your images")
    root, has_labels = folder, True
    if not (is_folder(folder / "train") and is_folder(folder / "val")):
        root = project / LINKS
        has_labels = _arrange(folder, root)
    listing = scan_folder(root, key="DATA")
    listing.check(root)
    train, val = (len(listing.splits[split]) for split in ("train", "val"))
    side = _median_side(root, listing)
    template = "single-gpu" if side >= PHOTOGRAPH_SIDE else "tiny"
    content = read_params(PRESETS / f"{template}.yaml")
    changes: dict[str, Any] = {
        "data.source": "imagefolder",
        "data.root": str(root if root == folder else LINKS),
    }
    changes |= {"data.num_train": None, "data.num_val": None, "transfer_data.source": "digits"}
    changes |= {"transfer_data.root": "data/raw/digits"}
    changes |= dict(_fitted(content, train, val, is_photograph=template == "single-gpu"))
    num_classes = len(listing.class_ids)
    found = f"{train:,} training and {val:,} validation images, classes: {num_classes}, in {root}"
    messages = [found, f"the median shorter side is {side} pixels: presets/{template}.yaml"]
    if root != folder:
        messages.append("there is no val/ in the folder: every tenth image is for validation")
    if not has_labels or num_classes < 2:
        # A probe of one class says nothing. The key stays valid, so that `validate` passes.
        changes |= {"probe.headline": "sgd", "probe.cs": [], "probe.few_labels": []}
        changes |= {"probe.baselines": "none", "class_condition.epochs": 0}
        messages += _without_labels(scored=_uses_inception(content, changes))
    if template == "single-gpu":  # a plan knows the costs of Stable Diffusion alone
        messages.append("`contradiff plan` shows what a run costs")
    faults = list(count_faults(_counts(content, changes), listing.splits))
    if faults:
        raise ValueError("\n".join(f"{key}: {text}" for key, text in faults))
    return OwnPreset(template, changes, tuple(messages))


def rewritten(text: str, changes: dict[str, Any]) -> str:
    """Return a preset's text with dotted keys set to new values; its other lines stay.

    The comments at the top, which describe the preset, are left out.
    """
    lines: list[str] = []
    section, in_old_list, missing = "", False, dict(changes)
    for line in text[text.index("\nseed:") :].splitlines():
        if in_old_list and line.startswith("  - "):
            continue
        if not line.startswith((" ", "#")) and ":" in line:
            section = line.partition(":")[0]
        key = f"{section}.{line.strip().partition(':')[0]}"
        in_old_list = line.startswith("  ") and key in missing
        if in_old_list:
            _, hash_sign, comment = line.partition("#")
            name, value = key.partition(".")[2], json.dumps(missing.pop(key))  # valid YAML
            lines.append(f"  {name}: {value:{24 - len(name)}} {hash_sign}{comment}".rstrip())
        else:
            lines.append(line)
    assert not missing, f"the preset lacks {', '.join(missing)}"
    return "\n".join(lines) + "\n"


def _arrange(folder: Path, root: Path) -> bool:
    """Link the images of `folder` as train/ and val/ below `root`; return whether they have labels.

    Raises ValueError if a class has a single image, which cannot be in both splits.
    """
    source = folder / "train" if is_folder(folder / "train") else folder
    classes = {path.name: path for path in sorted(source.iterdir()) if _may_be_class(path)}
    by_class = {name: images for name, place in classes.items() if (images := _images(place))}
    has_labels = bool(by_class)
    if not has_labels:
        by_class = {NO_CLASS: _images(source)}
    if lonely := [name for name, images in by_class.items() if len(images) < 2]:
        few = f"two images or more are needed in {source}, and in each of its folders"
        raise ValueError(f"DATA: {few}; there are fewer in: {', '.join(lonely[:5])}")
    root.parent.mkdir(parents=True, exist_ok=True)
    with replace_dir(root) as temporary:
        for name, images in by_class.items():
            for number, image in enumerate(images):
                split = "val" if number % 10 == 0 else "train"
                place = classes.get(name, source)
                link = temporary / split / name / image.relative_to(place)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(image)
    return has_labels


def _may_be_class(path: Path) -> bool:
    return path.is_dir() and path.name[0] != "."


def _images(folder: Path) -> list[Path]:
    return [folder / name for name, _ in images_in(folder, key="DATA", may_be_empty=True)[0]]


def _median_side(root: Path, listing: Listing) -> int:
    """Return the median of the shorter sides of some images, in pixels."""
    files = list(chain(*listing.splits.values()))
    sides: list[int] = []
    for file in files[:: max(1, len(files) // NUM_MEASURED)]:
        with suppress(UnidentifiedImageError), Image.open(root / file.path) as image:
            sides.append(min(image.size))
    if not sides:
        raise ValueError(f"DATA: no image in {root} can be read, such as {files[0].path}")
    return sorted(sides)[len(sides) // 2]


def _fitted(
    content: dict[str, Any], train: int, val: int, *, is_photograph: bool
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values that the numbers of images decide."""
    for name in ("pretrain", "class_condition"):
        largest = max(2, train // 10)
        yield f"{name}.batch_size", min(content[name]["batch_size"], 1 << largest.bit_length() - 1)
    if is_photograph:
        epochs = max(2, min(400, IMAGES_SEEN // train))
        yield "pretrain.epochs", epochs
        yield "pretrain.warmup_epochs", epochs / 20
    needed = content["extractor"]["width"] * 2
    if content["extractor"]["kind"] == "inception":
        needed = NUM_INCEPTION
    if max(train, val) < needed:
        yield "extractor.kind", "classifier"
        yield "extractor.weights", None
        yield "extractor.download", False
        yield "extractor.resizers", ["none"]
        needed = max(4, min(64, max(train, val)) // 4 * 4)
        yield "extractor.width", needed // 2
    yield "extractor.batch_size", min(content["extractor"]["batch_size"], max(2, train // 2))
    split = content["reference"]["split"] if min(train, val) >= needed else "train"
    yield "reference.split", split
    number = max(needed, min(content["generate"]["num_samples"], train))
    yield "generate.num_samples", number
    real = val if split == "val" else train
    subset = min(content["score"]["kid_subset_size"], real, number)
    yield "score.kid_subset_size", subset
    yield "score.splits", min(content["score"]["splits"], number)


def _uses_inception(content: dict[str, Any], changes: dict[str, Any]) -> bool:
    return changes.get("extractor.kind", content["extractor"]["kind"]) == "inception"


def _without_labels(*, scored: bool) -> list[str]:
    last = "score" if scored else "generate"
    lines = [
        "these images have no labels, or one class",
        f"type `dvc repro {last}`: it trains and generates",
        "left out are probe, baselines, separability, transfer, report and track",
    ]
    if not scored:
        why = "Inception needs 2,048 images, and the small classifier needs labels"
        lines.append(f"left out is score too: {why}")
    return lines


def _counts(content: dict[str, Any], changes: dict[str, Any]) -> CountParams:
    merged = {name: dict(v) if isinstance(v, dict) else v for name, v in content.items()}
    for key, value in changes.items():
        section, name = key.split(".")
        merged[section][name] = value
    return parse(CountParams, merged, source="params.yaml")
