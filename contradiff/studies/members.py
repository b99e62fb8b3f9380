"""The members of a study: the experiments that it needs, each with its complete parameters."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contradiff.config import flatten
from contradiff.studies.study import Changes, Study, changes_of, look_up, point_of

Params = dict[str, Any]
"""Content of params.yaml."""


@dataclass(frozen=True)
class Member:
    """An experiment: the changes to params.yaml, without and with the seed, and what results."""

    name: str
    changes: Changes
    seed: int
    params: Params

    @property
    def digest(self) -> str:
        """The digest of the parameters, which alone decides whether a result is this member's."""
        return digest_of(self.params)

    @property
    def options(self) -> list[str]:
        """The options of `dvc exp run` that make this member from params.yaml."""
        changes = {**self.changes, "seed": self.seed}
        return [word for key, value in changes.items() for word in ("-S", f"{key}={spell(value)}")]


def members_of(study: Study, name: str, base: Params) -> list[Member]:
    """Return the members of a study, seed by seed; `base` is the content of params.yaml.

    Rows that read other scores of the same experiment share a member. Raises ValueError if a key is
    unknown, or if two rows are the same point although their changes are spelt differently.
    """
    found: dict[str, Member] = {}
    titles: dict[str, str] = {}
    for seed in study.seeds:
        for row in study.own_rows:
            changes = changes_of(study, row)
            where = f'studies/{name}.yaml: row "{row.title}"'
            params = changed(base, {**changes, "seed": seed}, where=where)
            slug = "-".join(f"{key.split('.')[-1]}{_short(changes[key])}" for key in changes)
            label = f"{name}-{slug or 'default'}-seed{seed}"
            member = Member(label, changes, seed, params)
            known = found.setdefault(member.digest, member)
            other = titles.setdefault(member.digest, row.title)
            if point_of(known.changes) != point_of(changes):
                remedy = "remove one, or write the same `set`"
                raise ValueError(f'{where}: repeats the point of row "{other}"; {remedy}')
    counts: dict[str, int] = {}
    for digest, member in found.items():
        number = counts[member.name] = counts.get(member.name, 0) + 1
        if number > 1:  # such as {a.rank: 1} and {b.rank: 1}
            label = f"{member.name}-{number}"
            found[digest] = Member(label, member.changes, member.seed, member.params)
    return list(found.values())


def changed(base: Params, changes: Changes, *, where: str) -> Params:
    """Return params.yaml with changes; raises ValueError for a key that it does not have."""
    params = deepcopy(base)
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        try:
            look_up(params, key)
            place = look_up(params, section) if section else params
        except KeyError:
            raise ValueError(f"{where}: params.yaml has no key {key}; correct it") from None
        place[last] = value
    return params


def check_members(members: Sequence[Member], *, root: Path) -> None:
    """Check the members' parameters as the stage `validate` does.

    Raises ValueError that names every member that params.yaml's model refuses, and why.
    """
    from contradiff import rules
    from contradiff.base.config import config_folder
    from contradiff.config import parse_exactly

    faults: list[str] = []
    for member in members:
        content = {key: value for key, value in member.params.items() if key != "runtime"}
        try:
            params = parse_exactly(rules.AllParams, content, source=member.name)
        except ValueError as error:
            faults += str(error).splitlines()
            continue
        own = list(rules.between_sections(params))
        if not own:
            own = list(rules.with_base(params, config_folder(params.base, root=root)))
        faults += [f"{member.name}: {fault}" for fault in own]
    if faults:
        number = len({fault.partition(":")[0] for fault in faults})
        lead = f"params.yaml's rules refuse {number} of {len(members)} members; none is queued"
        raise ValueError("\n".join([lead, *faults]))


def flat_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters that may change a result: dotted keys, without section `runtime`."""
    return {key: value for key, value in flatten(params) if not key.startswith("runtime.")}


def digest_of(params: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that depend on all parameters that may change a result."""
    text = point_of(flat_params(params))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spell(value: Any) -> str:
    """Spell a value for `dvc exp run -S`."""
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value):
        return value
    return json.dumps(value, separators=(",", ":"))


def describe(changes: Mapping[str, Any]) -> str:
    """Spell changes as text, such as "loss.lambda=0.1 lora.rank=4"."""
    return " ".join(f"{key}={spell(value)}" for key, value in changes.items()) or "no change"


def _short(value: Any) -> str:
    """Return a value as part of an experiment's name, which is also a name in git."""
    return re.sub(r"[^\w.]+", "-", spell(value)).strip("-.")
