"""Two ways to do the same work: their results are compared, and then they are timed in turns."""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Work = Callable[[], Any]
Kind = Literal["speed", "time", "minutes"]
"""A figure is the peer's time / ours (speed), ours / the peer's (time), or minutes without peer."""
UNITS: dict[Kind, str] = {"speed": "× as fast", "time": "× the time", "minutes": " min"}


@dataclass(frozen=True)
class Row:
    """One line of the promise.

    `figure` is the median of the rounds, `lowest` and `highest` are its spread, and all three are
    None if the results differ by more than `tolerance`. `ours_s` and `peer_s` are medians of CPU
    seconds. `goal` is the least speed, or the most time; None if there is no goal.
    """

    name: str
    peer: str
    kind: Kind
    goal: float | None
    error: float | None = None
    tolerance: float | None = None
    note: str = ""
    figure: float | None = None
    lowest: float | None = None
    highest: float | None = None
    ours_s: float | None = None
    peer_s: float | None = None
    rounds: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether the results agree within the tolerance; true if there is none."""
        return self.tolerance is None or (self.error is not None and self.error <= self.tolerance)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the goal; None if there is no goal, or no figure."""
        if self.goal is None or self.figure is None:
            return None
        return self.figure >= self.goal if self.kind == "speed" else self.figure <= self.goal


def compare(
    name: str,
    peer: str,
    works: tuple[Work, Work],
    *,
    rounds: int,
    kind: Kind = "speed",
    goal: float | None = None,
    error: Callable[[], float] | None = None,
    tolerance: float | None = None,
    note: str = "",
    warm_up: bool = True,
) -> Row:
    """Compare the results by `error`; if they agree, time our work and the peer's in turns."""
    found = error() if error else None
    row = Row(name, peer, kind, goal, found, tolerance, note)
    if not row.is_equal:
        return row
    seconds: list[tuple[float, float]] = []
    for number in range(-1 if warm_up else 0, rounds):
        ours, theirs = (cpu_seconds_of(work) for work in works)
        if number >= 0:
            seconds.append((ours, theirs))
    return Row(name, peer, kind, goal, found, tolerance, note, *ratios(seconds, kind))


def ratios(
    seconds: list[tuple[float, float]], kind: Kind
) -> tuple[float, float, float, float, float, int]:
    """Turn the seconds of each round, (ours, peer's), into the last six fields of a row."""
    own, theirs = (median(column) for column in zip(*seconds, strict=True))
    all_ratios = [b / a if kind == "speed" else a / b for a, b in seconds]
    spread = min(all_ratios), max(all_ratios)
    return median(all_ratios), *spread, own, theirs, len(seconds)


def cpu_seconds_of(work: Work) -> float:
    """Run work; return the CPU seconds of this process and of the processes that have ended."""
    before = _cpu_seconds()
    work()
    return _cpu_seconds() - before


def _cpu_seconds() -> float:
    users = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in users)


def relative_error(result: "Tensor", reference: "Tensor") -> float:
    """Norm of the difference over the norm of the reference; NaN counts as infinite."""
    reference = reference.double()
    error = ((result.double() - reference).norm() / reference.norm()).item()
    return error if error == error else float("inf")  # noqa: PLR0124
