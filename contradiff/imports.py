"""Counts the seconds of slow imports, which a stage logs apart from its work.

Large libraries are imported where they are first needed, so that short commands do not wait.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager

_seconds: list[float] = []


@contextmanager
def slow_import() -> Generator[None]:
    """Count the seconds of the block, which only imports. Blocks must not be nested."""
    started = time.perf_counter()
    yield
    _seconds.append(time.perf_counter() - started)


def seconds_of_slow_imports() -> float:
    """Return how many seconds all blocks of `slow_import` took in this process."""
    return sum(_seconds, 0.0)
