"""Our training loader beside ImageFolder and webdataset: the same files, in this process.

All decode JPEGs of 256 pixels, cut random crops, and give batches of 50; the peers' are float32 in
[-1, 1]. Ours also reads two stored latents of each image. It hands over bytes, and the training
step makes float32 of them on its device: one row counts this, one does not. If the conditioner
reads latents (`conditioner.input: latents`), no image is decoded: other work for the same training.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from bench._turns import Row, compare, relative_error
from contradiff.data.latents import StoredLatents
from contradiff.data.pairs import PairedShards
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Sample, ShardIndex, image_record, write_split
from contradiff.data.streams import TrainingStream, training_batches
from contradiff.data.transforms import apply_crop, decode, random_crop
from contradiff.training.batch import ViewChooser
from contradiff.types import to_pixels

BATCH_SIZE, CROP_SCALE = 50, 0.2
BICUBIC = v2.InterpolationMode.BICUBIC
TO_TENSOR = v2.Compose(
    [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
)
CROP_TOLERANCE = 0.01
"""PIL resizes in integers, torch in another order: a level or two of 255."""


def rows(folder: Path, *, rounds: int, num_images: int = 250, size: int = 256) -> Iterator[Row]:
    """Yield the rows."""
    written = write_files(folder, num_images, size=size)
    peers = {"ImageFolder": image_folder, "webdataset": minimal_webdataset}
    crops: dict[str, Any] = {
        "goal": 1.5,
        "error": partial(error_of_crops, folder, size),
        "tolerance": CROP_TOLERANCE,
    }
    jpegs = f"loading JPEGs of {size} pixels and latents"
    options: dict[str, dict[str, Any]] = {
        "pixels": {"name": f"{jpegs}, float32", "note": "equal: 20 crops", **crops},
        "bytes": {
            "name": f"{jpegs}, as bytes",
            "note": "the device makes float32 of bytes; equal: 20 crops",
            **crops,
        },
        "latents": {
            "name": "loading latents alone",
            "goal": 5.0,
            "error": partial(error_of_latents, folder, written),
            "tolerance": 0.0,
            "note": "other work for the same training; equal: latents as written",
        },
    }
    for condition, option in options.items():
        for peer, load in peers.items():
            loaders = partial(ours, folder, condition, 0), partial(load, folder, size, 0)
            works = tuple(partial(exhaust, loader, num_images) for loader in loaders)
            yield compare(peer=f"{peer}, decoding", works=works, rounds=rounds, **option)


def exhaust(load: Callable[[], Iterable[Any]], num_images: int) -> None:
    """Take all batches of an epoch."""
    number = sum(1 for _ in load())
    assert number == num_images // BATCH_SIZE, "every loader must do the same work"


def error_of_crops(folder: Path, size: int) -> float:
    """Compare our pixels with those that ImageFolder's transforms make of the same crops."""
    rng, own, others = np.random.default_rng(1), list[Tensor](), list[Tensor]()
    for path in sorted(folder.glob("tree/*/*.jpg"))[:20]:
        crop = random_crop(rng, size, size, scale_min=CROP_SCALE)
        own.append(apply_crop(decode(path.read_bytes(), name=path.name), crop, size=size))
        box = crop.top, crop.left, crop.height, crop.width
        image = Image.open(path).convert("RGB")
        cut = functional.resized_crop(image, *box, size=[size, size], interpolation=BICUBIC)
        others.append(TO_TENSOR(functional.horizontal_flip(cut) if crop.mirrored else cut))
    return relative_error(to_pixels(torch.stack(own)), torch.stack(others))


def error_of_latents(folder: Path, written: set[bytes]) -> float:
    """Return 0 if an epoch has the centre crop's latents of every image, as they were written."""
    loaded = {row.tobytes() for b in ours(folder, "latents", 0) for row in b["moments"][0].numpy()}
    return float(loaded != written)


def write_files(folder: Path, num_images: int, *, size: int) -> set[bytes]:
    """Write an ImageFolder tree, image shards and latent shards; return centre crops' latents."""
    rng = np.random.default_rng(0)
    images, latents, centres = [], [], set[bytes]()
    for number in range(num_images):
        sample = Sample(f"{number:06d}", draw_jpeg(rng, size), number % 10)
        path = folder / f"tree/{sample.label}/{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
        moments = rng.normal(size=(2, 8, size // 8, size // 8)).astype(np.float16)
        centres.add(moments[0].tobytes())
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
    return centres


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
    crop = v2.RandomResizedCrop(size, scale=(CROP_SCALE, 1.0), interpolation=BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), TO_TENSOR])


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


def ours(folder: Path, kind: str, num_workers: int) -> Iterator[Any]:
    """Yield the batches of pretraining's loader, whose conditions are bytes.

    With `kind` "pixels", they become float32, as in a training step. With "latents", no image is
    decoded.
    """
    pairs = PairedShards.open(folder / "shards", folder / "latents", split="train")
    is_latent = kind == "latents"
    chooser = ViewChooser(
        pairs,
        latent_views="two",
        cond_view="crop" if is_latent else "same",
        condition="latents" if is_latent else "pixels",
        seed=0,
    )
    steps = {"batch_size": BATCH_SIZE, "start_step": 0, "seed": 0, "rank": 0, "world_size": 1}
    stream = TrainingStream(pairs, make_batch=chooser, with_images=not is_latent, **steps)
    batches = training_batches(stream, num_workers=num_workers)
    for batch in islice(batches, stream.order.steps_per_epoch):
        if kind == "pixels":
            [images] = batch["conditions"]
            yield {**batch, "conditions": to_pixels(images)[None]}
        else:
            yield batch
