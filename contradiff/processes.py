"""The processes that share a stage; without torch, which workers need not load."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """Which of `size` processes this is; `barrier` returns when every process has called it."""

    rank: int = 0
    size: int = 1
    barrier: Callable[[], object] = lambda: None
