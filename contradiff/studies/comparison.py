"""Compares a study's records: which of them may be averaged, means, and paired differences."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from contradiff.studies.store import Record, Store
from contradiff.studies.study import Row, Study, changes_of, point_of

FACTS = "score.extractor", "score.num_reference", "probe.total", "transfer.total"
"""Facts that must be the same in all records, although they are no parameters."""
REFERENCE = "score.reference_sha256"
"""What samples are compared with. It depends on the seed, where data depend on the seed."""


@dataclass(frozen=True)
class Comparison:
    """The records that may be compared, by changes and seed, and why others may not."""

    study: Study
    records: Mapping[tuple[str, int], Record]
    aside: list[tuple[Record, str]]
    base: str
    code: str

    def record(self, row: Row, seed: int) -> Record | None:
        """Return the record of a row and a seed."""
        return self.records.get((point_of(changes_of(self.study, row)), seed))

    def values(self, row: Row, column: str) -> dict[int, float]:
        """Return a row's values of a column by seed; seeds without a result are left out."""
        found: dict[int, float] = {}
        for seed in self.study.seeds:
            record = self.record(row, seed)
            value = record and record.metrics.get(self.study.key_of(row, column))
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[seed] = float(value)
        return found

    @property
    def missing(self) -> list[tuple[Row, list[int]]]:
        """The rows without results, and for which seeds."""
        found = [
            (row, [seed for seed in self.study.seeds if self.record(row, seed) is None])
            for row in self.study.own_rows
        ]
        return [(row, seeds) for row, seeds in found if seeds]


def compare(study: Study, store: Store) -> Comparison:
    """Choose the records that may be averaged, and say why the others may not.

    Most records have the same parameters (apart from the rows' changes), the same code and the
    same measuring facts: these are compared. Of equally large groups, the newer one counts.
    """
    rows = {point_of(changes_of(study, row)) for row in study.own_rows}
    usable = [
        each
        for each in store.records
        if point_of(each.changes) in rows and each.seed in study.seeds
    ]
    # A row's changes are missing in its base, so bases are compared without any row's changes; and
    # once more within each row.
    skip = {key for row in study.own_rows for key in changes_of(study, row)}
    common = {
        key: point_of({name: value for name, value in content.items() if name not in skip})
        for key, content in store.params.items()
    }
    facts = [name for name in FACTS if name.partition(".")[0] in study.stages]
    aside: list[tuple[Record, str]] = []
    for group, why in (
        (lambda each: common[each.base], "other parameters"),
        (lambda each: each.code, "other code"),
        (lambda each: point_of({name: each.metrics.get(name) for name in facts}), "other facts"),
    ):
        usable = _largest(usable, group, aside, why=why)
    by_row = {point_of(each.changes): list[Record]() for each in usable}
    for each in usable:
        by_row[point_of(each.changes)].append(each)
    usable = [
        each
        for records in by_row.values()
        for each in _largest(
            records,
            lambda one: point_of(store.params[one.base]),
            aside,
            why="other parameters",
        )
    ]
    if "score" in study.stages:
        by_seed = {seed: [each for each in usable if each.seed == seed] for seed in study.seeds}
        why = "other reference images or extractor: its FID and KID are not comparable"
        usable = [
            each
            for records in by_seed.values()
            for each in _largest(records, _reference, aside, why=why)
        ]
    first = usable[0] if usable else None
    return Comparison(
        study,
        {(point_of(each.changes), each.seed): each for each in usable},
        aside,
        base=first.base if first else "",
        code=first.code if first else "",
    )


def _reference(record: Record) -> str:
    return str(record.metrics.get(REFERENCE))


def _largest(
    records: Sequence[Record],
    group: Callable[[Record], str],
    aside: list[tuple[Record, str]],
    *,
    why: str,
) -> list[Record]:
    """Return the largest group of records, the newer of equal ones; put the others aside."""
    newest = {group(each): each.time for each in sorted(records, key=lambda each: each.time)}
    sizes = Counter(group(each) for each in records)
    best = max(sizes, key=lambda name: (sizes[name], newest[name]), default="")
    aside.extend((each, why) for each in records if group(each) != best)
    return [each for each in records if group(each) == best]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of values; None for the latter if there is one value."""

    mean: float
    std: float | None
    number: int


def spread(values: Mapping[int, float]) -> Spread | None:
    """Return mean and standard deviation over seeds, or None without values."""
    if not values:
        return None
    numbers = list(values.values())
    return Spread(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None, len(numbers))


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and the ends of its 95% interval if there are two or more."""

    mean: float
    interval: tuple[float, float] | None
    number: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def paired_difference(
    values: Mapping[int, float], others: Mapping[int, float]
) -> Difference | None:
    """Compare values with others of the same seeds by Student's t for paired values.

    Returns None without a common seed. The interval is two-sided, with n - 1 degrees of freedom.
    """
    both = [values[seed] - others[seed] for seed in values if seed in others]
    if not both:
        return None
    mean, number = fmean(both), len(both)
    if number == 1:
        return Difference(mean, None, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, number - 1)) * stdev(both) / sqrt(number)
    return Difference(mean, (mean - half, mean + half), number)
