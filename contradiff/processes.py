"""The processes that run one stage together. This file avoids the slow import of torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of the `count` parts of a stage's shards, which array jobs compute."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read a text such as "3/16". Raises ValueError if it is not one of 1/16 to 16/16."""
        number, _, count = text.partition("/")
        is_number = number.isdecimal() and count.isdecimal()
        if not is_number or not 1 <= int(number) <= int(count):
            raise ValueError(f"{text!r} is no part; the sixteen parts of 16 are 1/16 to 16/16")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"


class PartFinished(BaseException):  # no error
    """All shards of a part are finished. Nothing is published until the stage runs as a whole."""


@dataclass(frozen=True)
class Processes:
    """Process number `rank` of `size`; `barrier` waits until every process has called it.

    With a `part`, these processes compute only that part of the shards.
    """

    rank: int = 0
    size: int = 1
    barrier: Callable[[], object] = lambda: None
    part: Part | None = None

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items of this part: every n-th item, or all items without a part."""
        return items if self.part is None else items[self.part.number - 1 :: self.part.count]
