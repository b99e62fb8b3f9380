"""Images a second of the training loader, beside two usual ones on the same files in one run.

    python -m bench loading [number of images, 1000] [workers, 0] [side of the files, 256]

Each decodes the JPEGs, cuts a random crop of the files' side (bicubic), and stacks batches of 50:
torchvision's ImageFolder with a DataLoader; webdataset's minimal pipeline (shuffle, decode, batch);
ours, which also reads and picks the stored latents. `latents alone` is conditioner.input: latents,
which decodes nothing. The best of three rounds in turn, since other work on the machine only slows.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import get_worker_info

from contradiff.data.latents import StoredLatents
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Sample, ShardIndex, image_record, write_split
from contradiff.data.streams import PairedShards, TrainingStream, training_batches
from contradiff.data.transforms import random_crop
from contradiff.training.batch import ViewChooser

BATCH_SIZE, SAMPLES_PER_SHARD, ROUNDS = 50, 125, 3
CROP_SCALE = 0.2


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    num_images, num_workers, size = (
        int(given) for given in [*arguments, *("1000", "0", "256")[len(arguments) :]]
    )
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
                best[loader] = min(best[loader], seconds_of(build(), num_images // BATCH_SIZE))
    print(f"{num_images} JPEGs of {size} pixels, {num_bytes / num_images / 1e3:.0f} kB each")
    print(f"{num_workers} workers, {torch.get_num_threads()} threads, best of {ROUNDS} rounds\n")
    print(f"{'':28}{'images/s':>10}{'MB/s':>8}{'/ ImageFolder':>16}{'/ webdataset':>15}")
    folder_time, minimal_time = list(best.values())[:2]
    for loader, seconds in best.items():
        rates = f"{num_images / seconds:>10.0f}{num_bytes / seconds / 1e6:>8.1f}"
        print(f"{loader:28}{rates}{folder_time / seconds:>15.2f}x{minimal_time / seconds:>14.2f}x")


def seconds_of(batches: Iterable[Any], number: int) -> float:
    """Time to take batches, from asking for the first; workers are started in it."""
    start = time.perf_counter()
    taken = sum(1 for _ in islice(batches, number))
    assert taken == number, "every loader has the same work"
    return time.perf_counter() - start


def write_files(folder: Path, num_images: int, *, size: int) -> int:
    """Write an ImageFolder tree and shards of images and latents; return the JPEGs' bytes."""
    samples = list(draw_images(num_images, size=size))
    for sample in samples:
        path = folder / "tree" / str(sample.label) / f"{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
    rng = np.random.default_rng(1)
    records = {
        "shards": (image_record(sample, extension="jpg") for sample in samples),
        "latents": (
            StoredLatents(
                sample.key,
                rng.normal(size=(2, 8, size // 8, size // 8)).astype(np.float16),
                tuple(random_crop(rng, size, size, scale_min=CROP_SCALE) for _ in range(2)),
            ).to_record()
            for sample in samples
        ),
    }
    infos = {
        "shards": ImageInfo(class_ids=()),
        "latents": LatentInfo(
            dtype="float16",
            scaling_factor=1.0,
            image_size=size,
            views=2,
            flips=False,
            crop_scale_min=CROP_SCALE,
            colour_jitter=0.0,
        ),
    }
    for name, items in records.items():
        shards = write_split(
            folder / name,
            "train",
            items,
            samples_per_shard=SAMPLES_PER_SHARD,
            compression="none",
        )
        ShardIndex({"train": shards}, infos[name]).write(folder / name)
    return sum(len(sample.image) for sample in samples)


def draw_images(num_images: int, *, size: int) -> Iterator[Sample]:
    """Noise of all scales, which JPEG packs about as well as photographs (1.3 bits a pixel)."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(num_images):
        pixels = np.zeros((size, size, 3), np.float32)
        for scale in (size // 8, size // 32, size // 128):
            coarse = rng.integers(256, size=(size // scale, size // scale, 3), dtype=np.uint8)
            layer = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
            pixels += np.asarray(layer, np.float32) * scale
        pixels += rng.normal(scale=pixels.std() / 10, size=pixels.shape)
        low, high = pixels.min(), pixels.max()
        buffer = io.BytesIO()
        scaled = ((pixels - low) / (high - low) * 255).astype(np.uint8)
        Image.fromarray(scaled).save(buffer, "JPEG", quality=90)
        yield Sample(f"{index:06d}", buffer.getvalue(), index % 10)


def _crop(size: int) -> Any:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size, scale=(CROP_SCALE, 1.0), interpolation=v2.InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )


def image_folder(folder: Path, size: int, num_workers: int) -> Iterable[Any]:
    """What most training scripts use."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    return DataLoader(
        ImageFolder(folder / "tree", _crop(size)),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
    )


def minimal_webdataset(folder: Path, size: int, num_workers: int) -> Iterable[Any]:
    """The pipeline of webdataset's own introduction."""
    import webdataset

    urls = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    crop = _crop(size)
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(crop, int)
    )
    return webdataset.WebLoader(dataset, batch_size=BATCH_SIZE, num_workers=num_workers)


class _OneEpoch(TrainingStream):
    """The endless stream, ended as the others end: workers go no further ahead than theirs."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        steps = range(number, self.order.steps_per_epoch, num_workers)
        return islice(super().__iter__(), len(steps))


def ours(folder: Path, condition: Literal["pixels", "latents"], num_workers: int) -> Iterable[Any]:
    """As pretraining reads: one crop an image and two stored latents, or the latents alone."""
    pairs = PairedShards.open(folder / "shards", folder / "latents", split="train")
    stream = _OneEpoch(
        pairs,
        make_batch=ViewChooser(
            pairs,
            latent_views="two",
            cond_view="crop" if condition == "latents" else "same",
            condition=condition,
            seed=0,
        ),
        with_images=condition == "pixels",
        batch_size=BATCH_SIZE,
        start_step=0,
        seed=0,
        rank=0,
        world_size=1,
    )
    return training_batches(stream, num_workers=num_workers)
