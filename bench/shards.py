"""Writing and reading shards of images, beside webdataset, tarfile and torchvision's ImageFolder.

    python -m bench shards                       2,000 JPEGs of 28 KB and 2,000 of 1 KB, made here
    python -m bench shards data/raw/imagenet 5000    the first 5,000 of a tree's train/

One process; all ways read the same files and hold the same samples, in the same order. Each is run
three times in turn and its best time counts (CPU seconds, so that other processes matter less).
Images are not decoded, but where the line says so.
"""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from webdataset import ShardWriter, WebDataset

from contradiff.data.shards import Shard, ShardIndex, read_images, write_split
from contradiff.sources.folder import FileReader
from contradiff.sources.intake import Verify
from contradiff.sources.listing import EXTENSIONS, ImageFile
from contradiff.sources.packing import Recipe, plan_shards, write_planned

SAMPLES_PER_SHARD = 500
NUM_ROUNDS = 3
NUM_DIFFERENT = 50
NUM_IMAGES = 2000


def main(arguments: Sequence[str]) -> None:
    """Print a table for a tree's images, or for two kinds of images made here."""
    with tempfile.TemporaryDirectory() as name:
        if arguments:
            number = int(arguments[1]) if len(arguments) > 1 else NUM_IMAGES
            measure(arguments[0], Path(arguments[0]), number, Path(name))
            return
        for title, side in (("JPEGs of about 28 KB", 330), ("JPEGs of about 1 KB", 32)):
            root = Path(name) / str(side)
            make_images(root / "train", side=side)
            measure(title, root, NUM_IMAGES, root)


def make_images(folder: Path, *, side: int) -> None:
    """Smooth pictures with some noise, in ten classes; a few different ones, many times."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    contents: list[bytes] = []
    for _ in range(NUM_DIFFERENT):
        planes = [127 + 90 * np.sin(9 * x * rng.random() + 9 * y * rng.random()) for _ in range(3)]
        noisy = np.stack(planes, axis=-1) + rng.normal(scale=8, size=(side, side, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        contents.append(buffer.getvalue())
    for number in range(NUM_IMAGES):
        path = folder / f"n{number % 10:02d}" / f"n{number % 10:02d}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % NUM_DIFFERENT])


def measure(title: str, root: Path, num_images: int, scratch: Path) -> None:
    """Print a table for the first images of `root`/train."""
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    files = [
        ImageFile(path.relative_to(root).as_posix(), label)
        for label, name in enumerate(classes)
        for path in sorted((root / "train" / name).iterdir())
        if path.suffix.lower() in EXTENSIONS
    ][:num_images]
    sizes = [(root / file.path).stat().st_size for file in files]
    read = FileReader(root)
    plan = plan_shards(
        files,
        sizes,
        split="train",
        seed=0,
        samples_per_shard=SAMPLES_PER_SHARD,
        max_bytes=None,
        compression="none",
    )
    ordered = [file for planned in plan for file in planned.files]
    folders = {name: scratch / name for name in ("webdataset", "tarfile", "ours", "stage")}
    for folder in folders.values():
        folder.mkdir()

    def by_shard_writer() -> None:
        pattern = str(folders["webdataset"] / "train-%05d.tar")
        with ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, verbose=0, encoder=False) as writer:
            for file in ordered:
                label = str(file.label).encode()
                writer.write({"__key__": file.key, "jpg": read(file), "cls": label})

    def by_tarfile() -> None:
        for planned in plan:
            with tarfile.open(folders["tarfile"] / planned.name, "w") as archive:
                for file in planned.files:
                    contents = {"cls": str(file.label).encode(), "jpg": read(file)}
                    for extension, content in contents.items():
                        info = tarfile.TarInfo(f"{file.key}.{extension}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))

    def by_write_split() -> None:
        shards = write_split(
            folders["ours"],
            "train",
            (
                {"__key__": f.key.encode(), "jpg": read(f), "cls": str(f.label).encode()}
                for f in ordered
            ),
            samples_per_shard=SAMPLES_PER_SHARD,
            compression="none",
        )
        ShardIndex({"train": shards}, {}).write(folders["ours"])

    def by_stage(verify: Verify) -> Callable[[], None]:
        recipe = Recipe(compression="none", verify=verify, resize=None)

        def write() -> None:
            shards: list[Shard] = []
            for planned in plan:
                done = write_planned(planned, folders["stage"], read=read, recipe=recipe)
                shards += [done.shard] if done.shard is not None else []
            ShardIndex({"train": tuple(shards)}, {}).write(folders["stage"])

        return write

    def by_webdataset(folder: Path) -> Callable[[], None]:
        def walk() -> None:
            urls = [str(path) for path in sorted(folder.glob("*.tar"))]
            number = sum(len(item["jpg"]) > 0 for item in WebDataset(urls, shardshuffle=False))
            assert number == len(files)

        return walk

    def by_read_images() -> None:
        number = sum(len(sample.image) > 0 for sample in read_images(folders["ours"], "train"))
        assert number == len(files)

    def by_image_folder() -> None:
        images = ImageFolder(str(root / "train"), loader=lambda path: Path(path).read_bytes())
        order = np.random.default_rng(0).permutation(len(images))[: len(files)]
        assert all(len(images[index][0]) > 0 for index in order)

    ways: dict[str, Callable[[], None]] = {
        "write: webdataset's ShardWriter": by_shard_writer,
        "write: tarfile": by_tarfile,
        "write: ours (sha256 too)": by_write_split,
        "write: the stage, verify=header": by_stage("header"),
        "write: the stage, verify=full (decodes)": by_stage("full"),
        "read: webdataset, its shards": by_webdataset(folders["webdataset"]),
        "read: webdataset, our shards": by_webdataset(folders["ours"]),
        "read: ours (sha256 too)": by_read_images,
        "read: ImageFolder (files, listed anew)": by_image_folder,
    }
    report(title, ways, num_images=len(files), num_bytes=sum(sizes))


def report(
    title: str, ways: dict[str, Callable[[], None]], *, num_images: int, num_bytes: int
) -> None:
    """Time the ways in turn and print them; the first of each kind is what ratios are of."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(NUM_ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - started)
    print(f"{title}: {num_images} images, {num_bytes / 1e6:.0f} MB\n")
    print(f"{'':40}{'images/s':>12}{'MB/s':>10}{'ratio':>10}")
    first: dict[str, float] = {}
    for name, seconds in best.items():
        base = first.setdefault(name.partition(":")[0], seconds)
        rates = f"{num_images / seconds:>12,.0f}{num_bytes / seconds / 1e6:>10,.0f}"
        print(f"{name:40}{rates}{base / seconds:>9.2f}x", flush=True)
    print()
