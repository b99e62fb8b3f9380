"""Work ahead in threads: decode and resize the next images while a network computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int, num_ahead: int
) -> Iterator[Result]:
    """Yield what `map` yields, in the same order, while threads compute up to `num_ahead` results.

    With 0 threads nothing is computed ahead. The calling thread reads the items. `function` should
    release Python's lock for most of its time, as Pillow and torch do.
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
