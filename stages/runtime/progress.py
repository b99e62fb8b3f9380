"""Progress on stderr: a bar in a terminal, a line every ten seconds in a log file."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[..., None]
"""`advance(n, name=value, ...)`: n more units are done; the values are shown beside them."""


class _LogFile:
    """Writes each status as a line of its own; in a terminal, tqdm overwrites the last one."""

    def write(self, text: str) -> None:
        if status := text.strip():
            print(status, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def show_progress(
    description: str, *, total: int | None, unit: str, shown: bool
) -> Generator[Advance]:
    """Yield a function that reports progress; only the main process has it `shown`."""
    is_terminal = sys.stderr.isatty()
    with tqdm(
        desc=description,
        total=total,
        unit=unit,
        disable=not shown,
        file=sys.stderr if is_terminal else _LogFile(),
        mininterval=0.1 if is_terminal else SECONDS_BETWEEN_LINES,
        miniters=1,
        dynamic_ncols=is_terminal,
    ) as bar:

        def advance(n: int, /, **postfix: float | str) -> None:
            if postfix:
                bar.set_postfix(postfix, refresh=False)
            bar.update(n)

        yield advance
