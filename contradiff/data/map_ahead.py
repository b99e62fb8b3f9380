"""Apply a function to items in threads, ahead of the loop that uses the results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int, num_ahead: int
) -> Iterator[Result]:
    """Yield the same results as `map`, in order. Threads compute up to `num_ahead` results ahead.

    With 0 threads, nothing is computed ahead. Threads help only if `function` mostly releases
    Python's global lock (GIL), as Pillow and torch do.
    """
    if num_threads == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as executor:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
