"""Watches a training: its speed, its memory, and how long it waits for data."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Watch:
    """Measures a training between two reports. Measuring changes no result.

    `num_steps` is the number of the last step; `batch_size` counts the images of all processes.
    `ceiling` is the number of images per second at which the devices would do nothing but the
    step's arithmetic, at their maker's rate; None: not known. `clock` returns seconds.

    Example:
        >>> seconds = iter(range(100))
        >>> watch = Watch(num_steps=6, batch_size=24, device=None, clock=lambda: next(seconds))
        >>> for step, batch in enumerate(watch.waiting("abcd"), start=1):
        ...     measured = watch.measure(step)
        >>> measured["images_per_s"], measured["eta_s"], round(measured["waiting"], 2)
        (8.0, 6.0, 0.33)
    """

    def __init__(
        self,
        *,
        num_steps: int,
        batch_size: int,
        device: "torch.device | None",
        ceiling: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_steps, self.batch_size, self.ceiling = num_steps, batch_size, ceiling
        self.device, self.clock = device, clock
        self._waited: float | None = None
        self._last: tuple[int, float, float | None] | None = None

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and add up the time until each of them is there."""
        iterator = iter(batches)
        while True:
            start = self.clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited = (self._waited or 0.0) + self.clock() - start
            yield batch

    def measure(self, step: int) -> dict[str, float]:
        """Return what was measured since the last call; call it when a step has been finished.

        "memory_gb" (10^9 bytes) is the largest amount so far: of the tensors on a GPU, or of the
        process on a CPU. The first call returns nothing else, because the first step also warms
        up. Later calls add "images_per_s"; "eta_s", the seconds that the other steps will take at
        this speed; with a `ceiling`, "mfu", images_per_s / ceiling (the "model FLOPs
        utilisation"); and with `waiting`, "waiting": the part of the time, from 0 to 1, in which
        this process waited for its batches.
        """
        now = step, self.clock(), self._waited
        (last_step, then, waited), self._last = self._last or now, now
        measured = {"memory_gb": self._peak_memory() / 1e9}
        if step == last_step:
            return measured
        steps, seconds = step - last_step, now[1] - then
        measured["images_per_s"] = speed = steps * self.batch_size / seconds
        measured["eta_s"] = (self.num_steps - step) * seconds / steps
        if self.ceiling is not None:
            measured["mfu"] = speed / self.ceiling
        if self._waited is not None:
            measured["waiting"] = (self._waited - (waited or 0.0)) / seconds
        return measured

    def _peak_memory(self) -> int:
        if self.device is not None and self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        return peak_memory()


def peak_memory() -> int:
    """Return the largest number of bytes of main memory that this process has used."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
