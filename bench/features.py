"""A linear head on cached features beside one whose features are computed again in each epoch.

Both train the same head on the same batches in the same order, and end with equal weights. Ours
computes the features once, writes them to a file, and reads them from there.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench._tiny import random_model, read_tiny, write_base
from bench._turns import Row, compare, relative_error
from contradiff.features.batches import CleanBatch
from contradiff.features.models import DiffusionFeatures, compute_features
from contradiff.features.write_cache import write_table

NUM_CLASSES = 12


def rows(folder: Path, *, rounds: int, num_images: int = 128, epochs: int = 10) -> Iterator[Row]:
    """Yield the row."""
    from safetensors.torch import load_file

    write_base(folder)
    params = read_tiny()
    extract = DiffusionFeatures(random_model(folder), params.features, 0, torch.device("cpu"))
    batches = list(draw_batches(num_images, size=64))

    def ours() -> Tensor:
        table = compute_features(extract, batches)
        tensors, path = {"h": table.features, "labels": table.labels}, folder / "h.safetensors"
        write_table(path, tensors, keys=table.keys)
        cached = load_file(path)
        parts = zip(cached["h"].split(64), cached["labels"].split(64), strict=True)
        read = list(parts)
        return train(lambda: iter(read), width=params.head.width, epochs=epochs)

    def theirs() -> Tensor:
        def compute() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches:
                table = compute_features(extract, [batch])
                yield table.features, table.labels

        return train(compute, width=params.head.width, epochs=epochs)

    yield compare(
        f"features cached, a head of {epochs} epochs",
        "features computed in each epoch",
        (ours, theirs),
        rounds=min(rounds, 3),
        error=lambda: relative_error(ours(), theirs()),
        tolerance=1e-6,
        note="equal: the head's weights",
    )


def draw_batches(num_images: int, *, size: int) -> Iterator[CleanBatch]:
    """Draw latents and pixels for the tiny base, in batches."""
    generator = torch.Generator().manual_seed(3)
    for first in range(0, num_images, size):
        indices = tuple(range(first, min(first + size, num_images)))
        latents = torch.randn(len(indices), 4, 8, 8, generator=generator)
        pixels = torch.rand(len(indices), 3, 32, 32, generator=generator) * 2 - 1
        labels = torch.randint(NUM_CLASSES, (len(indices),), generator=generator)
        yield CleanBatch(indices, latents, pixels, labels, tuple(map(str, indices)))


def train(batches: Callable[[], Iterator[tuple[Any, Any]]], *, width: int, epochs: int) -> Tensor:
    """Train a linear head by SGD; return its weights."""
    torch.manual_seed(4)
    head = nn.Linear(width, NUM_CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for features, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(head(features), labels).backward()
            optimizer.step()
    return head.weight.detach()
