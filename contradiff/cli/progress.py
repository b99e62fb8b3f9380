"""What a command says while it works, on standard error: a bar, a status line, and its faults."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def say(text: str) -> None:
    """Write a line to standard error, without markup or line breaks."""
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def status(text: str) -> AbstractContextManager[object]:
    """Show a spinner with `text` during the block, if standard error is a terminal."""
    return _console().status(text)


@contextmanager
def progress_bar(text: str, *, total: int) -> Generator[Callable[[int], None]]:
    """Show a bar during the block, if standard error is a terminal.

    Yields a function that adds to the number of items that are done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = _console()
    disable = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=disable) as progress:
        task = progress.add_task(text, total=total)
        yield lambda number: progress.advance(task, number)


def _console() -> Console:
    return Console(stderr=True)  # finds the present sys.stderr
