"""Collects a study's results from DVC's experiments into its store, and says what is missing."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contradiff.files import replace_file
from contradiff.planning.times import newest_notes, read_notes
from contradiff.studies.experiments import (
    Experiment,
    Result,
    find_cache,
    list_experiments,
    read_cached,
    read_result,
)
from contradiff.studies.members import Member, flat_params
from contradiff.studies.pipeline import Graph, hashes_of
from contradiff.studies.queue import Task, list_tasks
from contradiff.studies.store import Aside, Record, Store, add_shared, drop_unused, samples_of
from contradiff.studies.study import Study, point_of, same_number

MEASURING = {
    *("generate", "extractor", "reference", "score", "probe", "transfer_data", "transfer"),
    *("separability",),
}
"""Sections that say how a model is measured. Experiments that differ there are set aside."""
State = Literal["done", "other code", "running", "queued", "failed", "missing"]


@dataclass(frozen=True)
class Standing:
    """What is known about a member: its state, where, and its result if it has one."""

    member: Member
    state: State
    note: str = ""
    record: Record | None = None


@dataclass(frozen=True)
class Collection:
    """A study's store after a look at all experiments, and how each member stands."""

    store: Store
    standings: list[Standing]
    samples: dict[str, bytes]

    def members(self, *states: State) -> list[Member]:
        """Return the members in these states."""
        return [each.member for each in self.standings if each.state in states]


def collect(root: Path, study: Study, members: Sequence[Member], store: Store) -> Collection:
    """Look for the members' results in the store and in DVC's experiments.

    A result is a member's if all parameters except `runtime` are equal. Of several experiments with
    the same parameters and code, the first counts; others with other scores are set aside.
    """
    by_digest = {member.digest: member for member in members}
    store = store.model_copy(deep=True)
    order = {(point_of(each.changes), each.seed): place for place, each in enumerate(members)}
    records = {
        (each.digest, each.code): each
        for each in store.records
        if (point_of(each.changes), each.seed) in order
    }
    aside = {each.experiment: each for each in store.aside}
    unfinished: dict[str, str] = {}
    samples: dict[str, bytes] = {}
    tasks, notes = list_tasks(root), read_notes(root)
    for experiment in list_experiments(root):
        label = f"{experiment.name} ({experiment.commit[:7]})"
        member = by_digest.get(experiment.digest)
        if member is None:
            if found := _with_other_measures(experiment, members):
                member, why = found
                aside[label] = Aside(
                    experiment=label, changes=member.changes, seed=member.seed, why=why
                )
            continue
        result = read_result(root, experiment, stages=study.stages)
        if isinstance(result, str):
            unfinished[member.digest] = f"{experiment.name} is no result: {result}"
            continue
        took = newest_notes(notes, flat_params(experiment.params))
        seconds = {stage: float(note["seconds"]) for stage, note in took.items()}
        record = _record(store, experiment, member, result, seconds)
        if "pretrain" in study.stages:
            record.metrics.update(
                _sizes(read_cached(find_cache(root), *_place(result, "build/pretrain")))
            )
        known = records.setdefault((record.digest, record.code), record)
        if known.experiment == label:
            # DVC's cache and the notes of times may be gone, so what is stored already stays.
            known.metrics = record.metrics | known.metrics
            known.seconds = known.seconds or record.seconds
            if study.samples and member.seed == study.seeds[0]:
                png = result.outs.get("build/figures/samples.png", "")
                grid = read_cached(find_cache(root), png)
                if grid is not None:
                    samples[f"{member.digest}.png"] = first_row_of(grid)
        elif any(known.metrics.get(key, value) != value for key, value in record.metrics.items()):
            why = f"a second run with other scores; {known.experiment} came first"
            aside[label] = Aside(
                experiment=label, changes=member.changes, seed=member.seed, why=why
            )
    # This order depends on the study alone, not on params.yaml.
    every = sorted(
        records.values(),
        key=lambda each: (order[point_of(each.changes), each.seed], each.time),
    )
    kept = drop_unused(store, every, [aside[key] for key in sorted(aside)])
    code = hashes_of(root, Graph.read(root).code(study.stages))
    standings = [
        _standing(each, records=every, store=kept, tasks=tasks, unfinished=unfinished, code=code)
        for each in members
    ]
    return Collection(kept, standings, samples)


def write_samples(root: Path, name: str, samples: Mapping[str, bytes]) -> None:
    """Write pictures of samples beside the study's page."""
    for file, content in samples.items():
        path = root / samples_of(name) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary:
            temporary.write_bytes(content)


def first_row_of(grid: bytes) -> bytes:
    """Return the first row, 16 images, of the picture that the stage `generate` draws."""
    from PIL import Image

    image = Image.open(io.BytesIO(grid))
    buffer = io.BytesIO()
    image.crop((0, 0, image.width, image.width // 16)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _place(result: Result, folder: str) -> tuple[str, str]:
    return result.outs.get(folder, ""), "config.json"


def _sizes(config: bytes | None) -> dict[str, int]:
    """Return the model's numbers of parameters from build/pretrain/config.json."""
    if config is None:
        return {}
    counts = json.loads(config)["parameters"]
    trainable, frozen = int(counts["trainable"]), int(counts["frozen"])
    return {
        "pretrain.trainable": trainable,
        "pretrain.frozen": frozen,
        "pretrain.total": trainable + frozen,
    }


def _record(
    store: Store,
    experiment: Experiment,
    member: Member,
    result: Result,
    seconds: Mapping[str, float],
) -> Record:
    base = {
        key: value
        for key, value in flat_params(member.params).items()
        if key != "seed" and key not in member.changes
    }
    return Record(
        changes=member.changes,
        seed=member.seed,
        digest=member.digest,
        base=add_shared(store.params, base),
        code=add_shared(store.code, result.code),
        revision=experiment.baseline,
        experiment=f"{experiment.name} ({experiment.commit[:7]})",
        time=experiment.time,
        seconds=dict(seconds),
        metrics=result.metrics,
        curve=result.curve,
    )


def _with_other_measures(
    experiment: Experiment, members: Sequence[Member]
) -> tuple[Member, str] | None:
    """Return the member that an experiment is, but for how it was measured; and the differences."""
    own = flat_params(experiment.params)
    for member in members:
        wanted = flat_params(member.params)
        keys = _differing(own, wanted)
        if keys and all(key.partition(".")[0] in MEASURING for key in keys):
            told = ", ".join(f"{key} {own.get(key)} instead of {wanted.get(key)}" for key in keys)
            return member, f"measured otherwise: {told}"
    return None


def _standing(
    member: Member,
    *,
    records: Sequence[Record],
    store: Store,
    tasks: Sequence[Task],
    unfinished: Mapping[str, str],
    code: Mapping[str, str],
) -> Standing:
    found = [record for record in records if record.digest == member.digest]
    for record in found:
        if store.code[record.code] == code:
            return Standing(member, "done", record.experiment, record)
    own = [task for task in tasks if task.digest == member.digest]
    for state in ("running", "queued"):
        for task in own:
            if task.state == state:
                return Standing(member, state, task.name)
    if found:
        then = store.code[found[-1].code]
        changed = sorted(key for key in {*then, *code} if then.get(key) != code.get(key))
        note = f"{found[-1].experiment}; since then changed: {', '.join(changed)}"
        return Standing(member, "other code", note, found[-1])
    for task in own:
        if task.state == "failed":
            return Standing(member, "failed", f"{task.name}: see {task.log}")
    return Standing(member, "missing", unfinished.get(member.digest, ""))


def base_differences(store: Store, members: Sequence[Member]) -> list[str]:
    """Say in which parameters the store's newest results differ from params.yaml."""
    if not store.records or not members:
        return []
    record = max(store.records, key=lambda each: each.time)
    then, now = store.params[record.base], flat_params(members[0].params)
    skip = {"seed", *members[0].changes, *record.changes}
    return [
        f"{key}: {then.get(key, '(none)')}, now {now.get(key, '(none)')}"
        for key in _differing(then, now)
        if key not in skip
    ]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys with different values, sorted; 1 and 1.0 are the same."""
    return sorted(
        key
        for key in one.keys() | other.keys()
        if same_number(one.get(key)) != same_number(other.get(key))
    )
