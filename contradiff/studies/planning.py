"""The order in which members run, and the hours that they need."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from contradiff.studies.members import Member
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


def hours_of(
    members: Sequence[Member],
    records: Sequence[Record],
    graph: Graph,
    stages: Sequence[str],
    done: Sequence[Member],
) -> Hours:
    """Estimate hours from the median of the times that each stage took in records.

    Work that another member has done, or will do before, takes no time: DVC's cache has it.
    """
    took: dict[str, list[float]] = {}
    for record in records:
        for stage, seconds in record.seconds.items():
            took.setdefault(stage, []).append(seconds)
    known = {work for member in done for work in _works(member, graph, stages)}
    hours: list[float] = []
    unmeasured: set[str] = set()
    for member in members:
        work = _by_stage(member, graph, stages)
        new = [stage for stage, signature in work.items() if signature not in known]
        known |= set(work.values())
        unmeasured |= {stage for stage in new if stage not in took}
        hours.append(sum(median(took[stage]) for stage in new if stage in took) / 3600)
    return Hours(hours, sorted(unmeasured))


def _works(member: Member, graph: Graph, stages: Sequence[str]) -> set[str]:
    return set(_by_stage(member, graph, stages).values())


def _by_stage(member: Member, graph: Graph, stages: Sequence[str]) -> Mapping[str, str]:
    """Return the digest of each stage's work: equal digests are the same work."""
    signatures = graph.signatures(member.params)
    names = graph.upstream(stages or [*graph.stages])
    # A frozen stage never runs.
    return {name: signatures[name] for name in names if not graph.stages[name].get("frozen")}
