"""What a training's watch measures, with a clock and a loader of our own."""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from contradiff import watch as module
from contradiff.watch import Watch


class Clock:
    """Seconds that pass only where a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def batches(self, seconds: list[float]) -> Iterator[int]:
        """Yield batches that take so long to come."""
        for number, wait in enumerate(seconds):
            self.now += wait
            yield number


def test_speed_time_left_and_waiting_are_those_between_two_reports():
    """The first step is not measured. Then: 4 steps in 4 s of waiting and 16 s of work."""
    clock = Clock()
    watch = Watch(num_steps=25, batch_size=64, device=None, ceiling=25.6, clock=clock)
    batches = watch.waiting(clock.batches([30.0, 1.0, 1.0, 1.0, 1.0, 0.0, 6.0]))
    reports: list[dict[str, float]] = []
    for step in range(11, 18):  # resumed at step 10
        next(batches)
        clock.now += 4.0
        if step in {11, 15, 17}:
            reports.append(watch.measure(step))
    first, second, third = reports
    assert first.keys() == {"memory_gb"}
    expected = {"images_per_s": 64 * 4 / 20, "eta_s": 10 * 20 / 4, "mfu": 0.5, "waiting": 0.2}
    assert {name: second[name] for name in second if name != "memory_gb"} == pytest.approx(expected)
    assert third["images_per_s"] == pytest.approx(64 * 2 / 14)
    assert (third["eta_s"], third["waiting"]) == pytest.approx((8 * 14 / 2, 6 / 14))


def test_what_is_not_known_is_missing():
    clock = Clock()
    watch = Watch(num_steps=2, batch_size=1, device=torch.device("cpu"), clock=clock)
    watch.measure(1)
    clock.now += 1.0
    assert watch.measure(2).keys() == {"memory_gb", "images_per_s", "eta_s"}


def test_an_error_of_the_loader_comes_through_and_its_end_ends_the_batches():
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("a damaged shard")

    batches = Watch(num_steps=2, batch_size=1, device=None).waiting(broken())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="a damaged shard"):
        next(batches)
    assert list(Watch(num_steps=2, batch_size=1, device=None).waiting([1, 2])) == [1, 2]


def test_memory_is_the_processs_on_a_cpu_and_the_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    watch = Watch(num_steps=2, batch_size=1, device=torch.device("cpu"))
    kilobytes = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert watch.measure(0)["memory_gb"] > 0.99 * 1024 * int(kilobytes[1]) / 1e9
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9 * 5 + device.index)
    watch = Watch(num_steps=2, batch_size=1, device=torch.device("cuda", 1))
    assert watch.measure(0) == {"memory_gb": 5.000000001}


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(module).failed == 0
