"""The order in which members run, and the hours that they need."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from contradiff.planning.times import Note
from contradiff.studies.members import Member, flat_params
from contradiff.studies.pipeline import Graph
from contradiff.studies.store import Record


def ordered(members: Sequence[Member], graph: Graph, stages: Sequence[str]) -> list[Member]:
    """Return members in an order in which DVC's cache saves the most, for any number of workers.

    First come members that do work which others need too, such as one of each seed; members that
    wait for the same work at the same time would stand idle. Equal members keep their order.
    """
    works = {member.name: _works(member, graph, stages) for member in members}
    users = Counter(work for each in works.values() for work in each)
    rest, found, done = list(members), list[Member](), set[str]()
    while rest:
        gains = [sum(users[work] > 1 for work in works[each.name] - done) for each in rest]
        best = rest[gains.index(max(gains))]
        rest.remove(best)
        found.append(best)
        done |= works[best.name]
    return found


@dataclass(frozen=True)
class Hours:
    """The hours of work of each member, in their order, and stages whose time is unknown."""

    by_member: list[float]
    unmeasured: list[str]


def seconds_of(
    notes: Sequence[Note], records: Sequence[Record], members: Sequence[Member]
) -> dict[str, float]:
    """Return the median seconds of each stage, if they are known.

    Notes count whose parameters are the members', but for those that the study changes; and the
    study's results, for stages without such a note.
    """
    own = flat_params(members[0].params) if members else {}
    varied = {"seed", *(key for member in members for key in member.changes)}
    noted, known = dict[str, list[float]](), dict[str, list[float]]()
    for note in notes:
        params: dict[str, Any] = note["params"]
        if all(key in varied or own.get(key) == value for key, value in params.items()):
            noted.setdefault(note["stage"], []).append(note["seconds"])
    for record in records:
        for stage, seconds in record.seconds.items():
            known.setdefault(stage, []).append(seconds)
    return {stage: median(each) for stage, each in (known | noted).items()}


def hours_of(
    members: Sequence[Member],
    seconds: Mapping[str, float],
    graph: Graph,
    stages: Sequence[str],
    done: Sequence[Member],
) -> Hours:
    """Estimate hours from the seconds that each stage takes.

    Work that another member has done, or will do before, takes no time: DVC's cache has it.
    """
    known = {work for member in done for work in _works(member, graph, stages)}
    hours: list[float] = []
    unmeasured: set[str] = set()
    for member in members:
        work = _by_stage(member, graph, stages)
        new = [stage for stage, signature in work.items() if signature not in known]
        known |= set(work.values())
        unmeasured |= {stage for stage in new if stage not in seconds}
        hours.append(sum(seconds.get(stage, 0.0) for stage in new) / 3600)
    return Hours(hours, sorted(unmeasured))


def _works(member: Member, graph: Graph, stages: Sequence[str]) -> set[str]:
    return set(_by_stage(member, graph, stages).values())


def _by_stage(member: Member, graph: Graph, stages: Sequence[str]) -> Mapping[str, str]:
    """Return the digest of each stage's work: equal digests are the same work."""
    signatures = graph.signatures(member.params)
    names = graph.upstream(stages or [*graph.stages])
    # A frozen stage never runs.
    return {name: signatures[name] for name in names if not graph.stages[name].get("frozen")}
