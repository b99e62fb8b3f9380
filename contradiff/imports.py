"""Counts the seconds of slow imports, which a stage logs apart from its work.

Large libraries are imported where they are first needed, so that short commands do not wait.
"""

import gc
import time
from collections.abc import Generator
from contextlib import contextmanager

_seconds: list[float] = []


@contextmanager
def slow_import() -> Generator[None]:
    """Count the seconds of the block, which only imports. Blocks must not be nested.

    The block makes no garbage, so the collector sleeps: it would take a fifth of the time.
    """
    started, was_enabled = time.perf_counter(), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        _seconds.append(time.perf_counter() - started)


def seconds_of_slow_imports() -> float:
    """Return how many seconds all blocks of `slow_import` took in this process."""
    return sum(_seconds, 0.0)
