"""What samples will cost is said before they are made."""

import time

import pytest
import torch

from contradiff.data.png import encode_png
from contradiff.data.shards import write_shard
from contradiff.generation.samples import max_bytes, seconds_of_batch


@pytest.mark.parametrize("size", [8, 32, 256])
def test_no_image_exceeds_the_most_bytes(tmp_path, size: int):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (20, 3, size, size), dtype=torch.uint8, generator=generator)
    pngs = enumerate(map(encode_png, noise))
    records = [{"__key__": b"%06d" % n, "png": png, "cls": b"999"} for n, png in pngs]
    shard = write_shard(tmp_path / "sample-00000.tar", records, compression="none")
    assert shard.num_bytes <= max_bytes(20, image_size=size)


def test_seconds_of_many_steps_follow_from_those_of_few(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def sample(num_steps: int) -> None:
        """The first call is slow; then a batch takes 5 seconds, and 2 more for each step."""
        nonlocal now
        now += 100 if now == 0 else 5 + 2 * num_steps

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert seconds_of_batch(sample, num_steps=50) == 105
