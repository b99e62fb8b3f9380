"""Progress on stderr: a bar for a terminal, a line now and then for a log file."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Report that `n` more units are done, with values to show beside them."""

    def __call__(self, n: int, /, **postfix: float | str) -> None:
        """Report."""
        ...


@contextmanager
def show_progress(
    description: str, *, total: int | None, unit: str, shown: bool
) -> Generator[Advance]:
    """Yield a function to be called at every step; it prints how much is done and what remains.

    Args:
        description: begins every line.
        total: number of units of the whole work, if known.
        unit: of what, in the singular.
        shown: False prints nothing, for all processes but the main one.
    """
    if not shown:
        yield _say_nothing
    elif sys.stderr.isatty():
        with tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True) as bar:

            def advance(n: int, /, **postfix: float | str) -> None:
                if postfix:
                    bar.set_postfix(postfix, refresh=False)
                bar.update(n)

            yield advance
    else:
        lines = _Lines(description, total=total, unit=unit)
        yield lines.advance
        lines.show()


def _say_nothing(_n: int, /, **_postfix: float | str) -> None:
    pass


class _Lines:
    def __init__(self, description: str, *, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self.done_at_last_line = 0
        self.started = self.last_line = time.monotonic()
        self.postfix = ""

    def advance(self, n: int, /, **postfix: float | str) -> None:
        self.done += n
        if postfix:
            self.postfix = ", ".join(
                f"{name}={value if isinstance(value, str) else format(value, '.4g')}"
                for name, value in postfix.items()
            )
        if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.show()

    def show(self) -> None:
        if self.done == self.done_at_last_line:
            return
        self.last_line, self.done_at_last_line = time.monotonic(), self.done
        meter = tqdm.format_meter(
            self.done,
            self.total,  # pyright: ignore[reportArgumentType]  # None: not known
            self.last_line - self.started,
            ncols=0,
            unit=self.unit,
            postfix=self.postfix or None,
        )
        print(f"{self.description}: {meter}", file=sys.stderr, flush=True)
