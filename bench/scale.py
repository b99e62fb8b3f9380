"""Scale: what 1.3 to 400 million images need on 8 to 256 GPUs, and what breaks first.

    python -m bench scale             write and open indexes of 10 million images, then the tables
    python -m bench scale --images 1000000 --write      fewer images; also write docs/scale.md

Indexes, lists and a saved state are tried for real on this machine. Rates of a GPU are measured
(docs/benchmarks.md); the rest is arithmetic for the node that is assumed.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._copies import ROOT
from bench._page import replace_between
from contradiff.config import parse, read_params
from contradiff.data.order import GROUPS, SHUFFLE_BUFFER, TrainingOrder
from contradiff.data.pairs import PairedShards
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import Shard, ShardIndex, ShardParams, shard_name
from contradiff.planning import costs
from contradiff.planning.plan import LATENT_BYTES
from contradiff.rules import AllParams
from contradiff.sources.listing import ImageFile, Listing, in_order
from contradiff.sources.packing import IngestParams, plan_shards, tar_bytes

PAGE = ROOT / "docs/scale.md"
SIZES = {"1.3M": 1_281_167, "14M": 14_200_000, "400M": 400_000_000}
GPUS = (8, 64, 256)
IMAGE_BYTES = tar_bytes(110_000)
NUM_CLASSES = 21_841
"""Those of ImageNet-21K."""
H100 = costs.GPUS["h100"]
TRAINING = H100.compiled_rates["training", "bf16"].images
FEATURES = H100.measured["features", "bf16"].images
ENCODING = H100.measured["encoding", "fp32"].images
STEP_IMAGES = 64
"""The images of a card at which its rate of training was measured."""
TRAINED_WEIGHTS = int(costs.OPTIMISER_GB * 1e9 / 12)
LATENT_IMAGES = 1200.0
"""Images a second whose stored latents a core reads (`python -m bench loading`, latents alone)."""
HEAD_SECONDS = 0.05
"""A server's answer to the question for a shard's size; 16 are asked at once."""


@dataclass(frozen=True)
class Node:
    """A machine of 8 H100s, as clouds rent it: cores, memory, disk and network."""

    gpus: int = 8
    cores: int = 112
    memory_gb: float = 1000.0
    disk_gb: float = 28_000.0
    network_gb: float = 50.0
    """A second, with all other nodes together (400 Gbit/s)."""


NODE = Node()


@dataclass(frozen=True)
class Tried:
    """CPU seconds and peak megabytes of one trial."""

    name: str
    seconds: float
    megabytes: float


def main(arguments: Sequence[str]) -> None:
    """Try, and print or write the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000, help="images of the trials")
    parser.add_argument("--write", action="store_true", help="write docs/scale.md")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        tried = {trial.name: trial for trial in trials(Path(folder), options.images)}
    lines = list(tables(tried, options.images))
    print(*lines, sep="\n")
    if options.write:
        replace_between(PAGE, "scale", lines)


def trials(folder: Path, num_images: int) -> Iterator[Tried]:
    """Run each trial in a new process, because only a process knows its peak of memory."""
    context = multiprocessing.get_context("spawn")
    shards: tuple[Any, ...] = (folder, num_images)
    for name, function, given in (
        ("write both indexes", write_indexes, shards),
        ("open both indexes", open_indexes, shards),
        ("hash both indexes, to find a saved state", hash_indexes, shards),
        ("draw the order of an epoch", draw_order, shards),
        ("list the images, and sort them", list_images, (num_images,)),
        ("list, check and divide among shards", plan_images, (num_images,)),
        ("save the state of a training", save_state, (folder, TRAINED_WEIGHTS)),
    ):
        with ProcessPoolExecutor(1, context) as pool:
            seconds, megabytes = pool.submit(measured, function, *given).result()
        yield Tried(name, seconds, megabytes)


def measured(function: Callable[..., Callable[[], object]], *given: Any) -> tuple[float, float]:
    """Prepare the work, run it, and return its CPU seconds, and by how much memory grew."""
    work = function(*given)
    before, started = _peak_mb(), time.process_time()
    work()
    return time.process_time() - started, _peak_mb() - before


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def paper() -> AllParams:
    """Return the paper preset."""
    path = ROOT / "presets/paper.yaml"
    return parse(AllParams, read_params(path), source=str(path))


def write_indexes(folder: Path, num_images: int) -> Callable[[], object]:
    """Write indexes of image shards and latent shards; the shards are files without content."""
    per_shard, info = paper().shard.samples_per_shard, ImageInfo(class_ids=())
    stored = {"dtype": "float16", "scaling_factor": 1.0, "image_size": 256, "views": 2}
    stored |= {"flips": True, "crop_scale_min": 0.2, "colour_jitter": 0.0}
    infos = {"shards": info, "latents": LatentInfo.model_validate(stored)}
    indexes: dict[str, ShardIndex[Any]] = {}
    for kind, info in infos.items():
        (folder / kind).mkdir()
        names = [shard_name("train", n, "none") for n in range(-(-num_images // per_shard))]
        for name in names:
            with (folder / kind / name).open("wb") as file:
                file.truncate(per_shard * IMAGE_BYTES)
        shards = [Shard(name, per_shard, per_shard * IMAGE_BYTES, "0" * 64) for name in names]
        indexes[kind] = ShardIndex({"train": tuple(shards)}, info)
    return lambda: [index.write(folder / kind) for kind, index in indexes.items()]


def _open(folder: Path) -> PairedShards:
    return PairedShards.open(folder / "shards", folder / "latents", split="train")


def open_indexes(folder: Path, _num_images: int) -> Callable[[], object]:
    """Read both indexes, and look at the size of each shard."""
    return lambda: _open(folder)


def hash_indexes(folder: Path, _num_images: int) -> Callable[[], object]:
    """Compute the key of a training's saved state."""
    pairs = _open(folder)
    return lambda: pairs.digest


def draw_order(folder: Path, _num_images: int) -> Callable[[], object]:
    """Draw what every stream of an epoch reads."""
    order = TrainingOrder(_open(folder).sizes, 512, 0)
    places = [(r, s) for r in range(order.num_row_groups) for s in range(order.num_step_groups)]
    return lambda: [order.ranges(epoch=0, row_group=r, step_group=s) for r, s in places]


def _list(num_images: int) -> Listing:
    ids = [f"n{label:08d}" for label in range(NUM_CLASSES)]
    numbered = ((n, n % NUM_CLASSES) for n in range(num_images))
    files = (
        ImageFile(f"train/{ids[label]}/{ids[label]}_{n}.JPEG", label, 110_000)
        for n, label in numbered
    )
    return Listing(tuple(ids), tuple(ids), {"train": in_order(files)})


def list_images(num_images: int) -> Callable[[], object]:
    """Keep a list of all images, as `prepare` and `shard` do; no disk is read."""
    return lambda: _list(num_images)


def plan_images(num_images: int) -> Callable[[], object]:
    """Do all that `shard` does before its first shard, except for reading the disk."""
    ingest = {"max_shard_megabytes": 500, "verify": "full", "resize": None, "max_quarantined": 0.0}

    def work() -> object:
        listing = _list(num_images)
        listing.check(Path("data"))
        params = ShardParams(samples_per_shard=4096, compression="none")
        sizes = IngestParams.model_validate(ingest)
        return plan_shards(listing, seed=0, shard=params, ingest=sizes)

    return work


def save_state(folder: Path, num_weights: int) -> Callable[[], object]:
    """Save trained weights and AdamW's two moments, with their SHA-256."""
    import torch

    from contradiff.training.state import SavedState

    weight = torch.nn.Parameter(torch.zeros(num_weights))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = SavedState(folder / "state.safetensors", {"model.weight": weight.detach()}, every=1)
    return lambda: state.save(1, optimizer)


def tables(tried: Mapping[str, Tried], num_images: int) -> Iterator[str]:
    """Yield the lines of the page's three tables."""
    yield f"### Tried with {num_images:,} images"
    yield ""
    yield "| what | CPU seconds | memory it adds, MB |"
    yield "|---|---|---|"
    for trial in tried.values():
        yield f"| {trial.name} | {trial.seconds:.1f} | {trial.megabytes:,.0f} |"
    yield ""
    yield "### What a number of images needs"
    yield ""
    yield "| images | " + " | ".join(SIZES) + " | from |"
    yield "|---|" + "---|" * (len(SIZES) + 1)
    columns = [needs(number, tried, num_images) for number in SIZES.values()]
    for name in columns[0]:
        cells = [column[name][0] for column in columns]
        yield f"| {name} | {' | '.join(cells)} | {columns[0][name][1]} |"
    yield ""
    yield "### What breaks first"
    yield ""
    heads = "images", "GPUs", "an epoch", "images/s a node", "cores a node", "read a node"
    yield f"| {' | '.join(heads)} | gradients: share of a step | first |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, number in SIZES.items():
        for gpus in GPUS:
            yield run_line(name, number, gpus, tried, num_images)


def needs(number: int, tried: Mapping[str, Tried], of: int) -> dict[str, tuple[str, str]]:
    """Return what images need, whatever the number of GPUs: name => (text, where it is from)."""
    params = paper()
    crops = params.latents.views * (1 + params.latents.flips)
    shards = -(-number // params.shard.samples_per_shard)
    share, opening = number / of, tried["open both indexes"]
    listing = tried["list, check and divide among shards"]
    return {
        "image shards": (_size(number * IMAGE_BYTES), "arithmetic: JPEGs of 110 kB"),
        "latents": (_size(number * latent_bytes()), f"arithmetic: {crops} crops of an image"),
        "features h": (_size(number * 2 * params.head.width), "arithmetic: 16 bits"),
        "shards of 4,096": (f"{shards:,}", "arithmetic"),
        "open the indexes": (
            f"{share * opening.seconds:.1f} s, {share * opening.megabytes:,.0f} MB",
            "tried, a process; scaled",
        ),
        "the same on a server": (
            _time(2 * shards * HEAD_SECONDS / 16),
            f"stated: {1e3 * HEAD_SECONDS:.0f} ms an answer, 16 at once",
        ),
        "list and divide raw images": (
            f"{_time(share * listing.seconds)}, {share * listing.megabytes / 1e3:,.1f} GB",
            "tried; scaled",
        ),
        "shuffle buffers": (
            _size(SHUFFLE_BUFFER * (IMAGE_BYTES + latent_bytes())),
            f"arithmetic: {SHUFFLE_BUFFER:,} samples in all",
        ),
        "latents on 8 GPUs": (_time(number * crops / ENCODING / 8), "measured rate of an H100"),
        "features on 8 GPUs": (_time(number / FEATURES / 8), "measured rate of an H100"),
        "logistic regression": (
            f"{_size(number * 8 * params.head.width)} of memory",
            "arithmetic: float64",
        ),
        "a saved state": (
            f"{_size(12 * TRAINED_WEIGHTS)}, {tried['save the state of a training'].seconds:.1f} s",
            "tried",
        ),
    }


def latent_bytes() -> int:
    """Return the bytes of an image's stored crops."""
    section = paper().latents
    return section.views * (1 + section.flips) * LATENT_BYTES + 2048


def run_line(name: str, number: int, gpus: int, tried: Mapping[str, Tried], num_images: int) -> str:
    """Return a row: what a training on so many GPUs needs of a node, and what breaks first."""
    params, share = paper(), number / num_images
    wanted = TRAINING * NODE.gpus
    # Beyond GROUPS row groups, several processes read a stream whole, and use a part of it.
    repeated = max(1.0, gpus / max(GROUPS))
    sample = IMAGE_BYTES + latent_bytes()
    read_gb = wanted * repeated * sample / 1e9
    cores = wanted / costs.WORKER_IMAGES + wanted * repeated / LATENT_IMAGES
    traffic = 2 * 4 * TRAINED_WEIGHTS / 1e9 / NODE.network_gb if gpus > NODE.gpus else 0.0
    step_seconds = STEP_IMAGES / TRAINING
    listing = tried["list, check and divide among shards"].megabytes / 1e3 * share
    each = params.pretrain.batch_size / gpus
    limits = {
        f"{each:g} images a GPU of a batch of {params.pretrain.batch_size}": 16 / each,
        "reading: each process reads a whole stream": read_gb / NODE.network_gb,
        "decoding": cores / NODE.cores,
        "latents and images on a node's disk": number * sample / 1e9 / NODE.disk_gb,
        "the list of raw images": listing / NODE.memory_gb,
        "logistic regression in memory": number * 8 * params.head.width / 1e9 / NODE.memory_gb,
    }
    beyond = sorted((factor, limit) for limit, factor in limits.items() if factor > 1)[::-1]
    broken = "; ".join(f"{limit} ({factor:.1f} ×)" for factor, limit in beyond) or "nothing"
    cells = [name, gpus, _time(number / TRAINING / gpus), f"{wanted:,.0f}", f"{cores:.0f}"]
    cells += [f"{read_gb:.2f} GB/s", f"{traffic / step_seconds:.0%}", broken]
    return f"| {' | '.join(map(str, cells))} |"


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e6:,.0f} MB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
