"""The processes that run one stage together. This file avoids the slow import of torch."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """Process number `rank` of `size`; `barrier` waits until every process has called it."""

    rank: int = 0
    size: int = 1
    barrier: Callable[[], object] = lambda: None
