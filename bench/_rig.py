"""What rows that are timed on one device share: a time budget, guards, checks, FLOPs, a table."""

import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench._turns import relative_error

Row = dict[str, Any]


class Rig:
    """Runs measurements in turn. One that fails, or for which no time is left, stops no other."""

    def __init__(self, device: torch.device, *, seconds: float, output: Path | None) -> None:
        self.device, self.output = device, output
        self.seconds, self.started = seconds, time.monotonic()
        self.ceiling: float | None = None
        """FLOP/s of a large matrix product in bfloat16; MFU is a share of it."""
        self.facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
        self.facts["device"] = "cpu"
        if device.type == "cuda":
            self.facts["device"] = torch.cuda.get_device_name(device)
        self.rows: list[Row] = []
        self.references: dict[str, tuple[Tensor, float]] = {}
        """The first result of each kind of work, and its FLOPs."""

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.seconds - (time.monotonic() - self.started)

    def attempt(self, label: str, body: Callable[[], Mapping[str, Any]], *, needs: float) -> None:
        """Add the row that `body` returns, unless fewer than `needs` seconds are left."""
        row: Row = {"row": label}
        if (left := self.left()) < needs:
            row["skipped"] = f"needs {needs:.0f} s, {max(0, left):.0f} s are left"
        else:
            try:
                with _limit(left):
                    row |= body()
            except Exception as error:  # noqa: BLE001  # the other rows go on
                lines = str(error).strip().splitlines()
                row["failed"] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
                traceback.print_exc(limit=-6)
        row["ended_after_s"] = round(self.seconds - self.left(), 1)
        self.rows.append(row)
        print(f"{row['ended_after_s']:6.1f} s  {line(row)}", file=sys.stderr, flush=True)
        self.write()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def measure(
        self,
        label: str,
        work: Callable[[], Tensor],
        *,
        images: float,
        calls: int = 1,
        check: Callable[[], Tensor] | None = None,
        reference: str | None = None,
        tolerance: float = 0.0,
        flops: float | None = None,
        needs: float = 4.0,
    ) -> None:
        """Check that a variant gives its reference's result, then time it: a median of repeats.

        `check`, or else `work`, gives the result. The first row of a `reference` is what the others
        are compared with; they do the same work, so they count as many FLOPs. Other FLOPs that are
        not given are counted. One `work` is `calls` calls of `images` each.
        """

        def body() -> Row:
            known, started = self.references.get(reference or ""), time.monotonic()
            counter = FlopCounterMode(display=False)
            with counter if flops is None and known is None else nullcontext():
                result = (check or work)().detach().float()
            row: Row = {"first_s": time.monotonic() - started}
            counted = flops or (known[1] if known else float(counter.get_total_flops()))
            if reference is not None:
                error = relative_error(result, known[0] if known else result)
                row |= {"error": error, "tolerance": tolerance, "same": error <= tolerance}
                self.references.setdefault(reference, (result, counted))
            del result
            seconds, row["repeats"], row["spread"] = self._time(work)
            row |= {"ms": seconds / calls * 1e3, "images_per_s": images * calls / seconds}
            row |= {"flops": counted / calls, "tflop_per_s": counted / seconds / 1e12}
            row["mfu"] = counted / seconds / self.ceiling if self.ceiling else None
            is_cuda = self.device.type == "cuda"
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None
            return row

        self.attempt(label, body, needs=needs)

    def _time(self, work: Callable[[], Tensor]) -> tuple[float, int, float]:
        """Return the median seconds of a repeat, the repeats, and (slowest - fastest) / median."""
        repeats = 1
        if self.device.type == "cuda":
            self._marks(work, 1)  # to warm up: the optimiser's state, the choice of kernels
            torch.cuda.reset_peak_memory_stats()
            repeats = max(3, min(20, int(0.6 / self._marks(work, 1)[0])))
        times = self._marks(work, repeats)
        return (middle := median(times)), repeats, (max(times) - min(times)) / middle

    def _marks(self, work: Callable[[], Tensor], repeats: int) -> list[float]:
        """Run work back to back; return the seconds between marks in the device's own queue."""
        if self.device.type != "cuda":
            clock = [time.perf_counter()]
            for _ in range(repeats):
                work()
                clock.append(time.perf_counter())
            return [b - a for a, b in pairwise(clock)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]

    def write(self) -> None:
        """Write what is known so far as JSON."""
        if self.output is not None:
            content = {**self.facts, "rows": self.rows}
            self.output.write_text(json.dumps(content, indent=1, default=str) + "\n")


def line(row: Row) -> str:
    """One row of the table."""
    label = f"{row['row']:57}"
    if fault := next((f"{key}: {row[key]}" for key in ("skipped", "failed") if key in row), None):
        return label + fault
    if "note" in row:
        return label + row["note"]
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
    same = "" if "error" not in row else f"{row['error']:.1e}{'' if row['same'] else ' NOT EQUAL'}"
    numbers = f"{row['images_per_s']:>9.1f}{row['ms']:>10.2f}{row['tflop_per_s']:>9.1f}"
    return f"{label}{numbers}{mfu:>7}{peak:>6} {same}"


HEAD = f"{'':57}{'images/s':>9}{'ms':>10}{'TFLOP/s':>9}{'MFU':>7}{'GB':>6} error"


@contextmanager
def _limit(seconds: float) -> Generator[None]:
    """Raise TimeoutError in the block after so many seconds, such as in an endless compilation."""

    def stop(_number: int, _frame: object) -> None:
        raise TimeoutError("the budget has run out")

    before = signal.signal(signal.SIGALRM, stop)
    # Again every ten seconds, should a library swallow the first.
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds), 10.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
