"""Compare our training loader with ImageFolder and webdataset: images per second on the same files.

    python -m bench loading [number of images, 1000] [workers, 0] [side of the files, 256]

The loaders decode JPEGs, cut random crops and stack batches of 50. Our loader also reads stored
latents; in the row "ours, latents alone", it decodes no images. The table shows the best of three
rounds, because other work on the machine can only slow a round down.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from contradiff.data.latents import StoredLatents
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Sample, ShardIndex, image_record, write_split
from contradiff.data.streams import PairedShards, TrainingStream, training_batches
from contradiff.data.transforms import random_crop
from contradiff.training.batch import ViewChooser

BATCH_SIZE, ROUNDS, CROP_SCALE = 50, 3, 0.2


def main(arguments: Sequence[str]) -> None:
    """Measure all loaders and print the table."""
    num_images, num_workers, size = map(int, [*arguments, *("1000", "0", "256")[len(arguments) :]])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = write_files(folder, num_images, size=size)
        loaders: dict[str, Callable[[], Iterable[Any]]] = {
            "torchvision ImageFolder": partial(image_folder, folder, size, num_workers),
            "webdataset, minimal": partial(minimal_webdataset, folder, size, num_workers),
            "ours, pixels and latents": partial(ours, folder, "pixels", num_workers),
            "ours, latents alone": partial(ours, folder, "latents", num_workers),
        }
        best = dict.fromkeys(loaders, float("inf"))
        for _ in range(ROUNDS):
            for loader, build in loaders.items():
                start = time.perf_counter()
                num_batches = sum(1 for _ in build())
                best[loader] = min(best[loader], time.perf_counter() - start)
                assert num_batches == num_images // BATCH_SIZE, "every loader must do the same work"
    print(f"{num_images} JPEGs of {size} pixels, {num_bytes / num_images / 1e3:.0f} kB each")
    print(f"{num_workers} workers, {torch.get_num_threads()} threads, best of {ROUNDS} rounds\n")
    print(f"{'':28}{'images/s':>10}{'MB/s':>8}{'/ ImageFolder':>16}{'/ webdataset':>15}")
    slow, minimal = list(best.values())[:2]
    for loader, seconds in best.items():
        rates = f"{num_images / seconds:>10.0f}{num_bytes / seconds / 1e6:>8.1f}"
        print(f"{loader:28}{rates}{slow / seconds:>15.2f}x{minimal / seconds:>14.2f}x")


def write_files(folder: Path, num_images: int, *, size: int) -> int:
    """Write an ImageFolder tree, image shards and latent shards; return the JPEGs' total bytes."""
    rng = np.random.default_rng(0)
    images, latents, num_bytes = [], [], 0
    for number in range(num_images):
        sample = Sample(f"{number:06d}", draw_jpeg(rng, size), number % 10)
        path = folder / f"tree/{sample.label}/{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        num_bytes += path.write_bytes(sample.image)
        moments = rng.normal(size=(2, 8, size // 8, size // 8)).astype(np.float16)
        crops = tuple(random_crop(rng, size, size, scale_min=CROP_SCALE) for _ in range(2))
        images.append(image_record(sample, extension="jpg"))
        latents.append(StoredLatents(sample.key, moments, crops).to_record())
    stored = {"dtype": "float16", "scaling_factor": 1.0, "image_size": size, "views": 2}
    stored |= {"flips": False, "crop_scale_min": CROP_SCALE, "colour_jitter": 0.0}
    infos = {"shards": ImageInfo(class_ids=()), "latents": LatentInfo(**stored)}
    settings = {"samples_per_shard": 125, "compression": "none"}
    for (name, info), records in zip(infos.items(), (images, latents), strict=True):
        shards = write_split(folder / name, "train", records, **settings)
        ShardIndex({"train": shards}, info).write(folder / name)
    return num_bytes


def draw_jpeg(rng: np.random.Generator, size: int) -> bytes:
    """Draw noise that JPEG compresses as much as a photograph, to 1.3 bits per pixel."""
    pixels = np.zeros((size, size, 3), np.float32)
    for scale in (size // 8, size // 32, size // 128):
        coarse = rng.integers(256, size=(size // scale, size // scale, 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, np.float32) * scale
    pixels += rng.normal(scale=pixels.std() / 10, size=pixels.shape)
    scaled = (pixels - pixels.min()) / np.ptp(pixels) * 255
    buffer = io.BytesIO()
    Image.fromarray(scaled.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _crop(size: int) -> Any:
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, scale=(CROP_SCALE, 1.0), interpolation=bicubic)
    tensor = v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *tensor])


def image_folder(folder: Path, size: int, num_workers: int) -> Iterable[Any]:
    """Return the loader that most training scripts use."""
    images = ImageFolder(folder / "tree", _crop(size))
    return DataLoader(images, batch_size=BATCH_SIZE, shuffle=True, num_workers=num_workers)


def minimal_webdataset(folder: Path, size: int, num_workers: int) -> Iterable[Any]:
    """Return the loader that webdataset's introduction shows."""
    urls = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
    dataset = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(_crop(size), int)
    return webdataset.WebLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers)


def ours(folder: Path, condition: Literal["pixels", "latents"], num_workers: int) -> Iterable[Any]:
    """Return pretraining's loader. If `condition` is "latents", it decodes no images."""
    pairs = PairedShards.open(folder / "shards", folder / "latents", split="train")
    cond_view = "crop" if condition == "latents" else "same"
    views = {"latent_views": "two", "cond_view": cond_view, "condition": condition}
    steps = {"batch_size": BATCH_SIZE, "start_step": 0, "seed": 0, "rank": 0, "world_size": 1}
    chooser, with_images = ViewChooser(pairs, **views, seed=0), condition == "pixels"
    stream = TrainingStream(pairs, make_batch=chooser, with_images=with_images, **steps)
    batches = training_batches(stream, num_workers=num_workers)
    return islice(batches, stream.order.steps_per_epoch)
