"""How long stages took: the notes in .work/times, which each stage leaves there.

A note belongs to a stage and its parameters. So an experiment finds the times of stages that DVC
takes from its cache, too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contradiff.files import explain_damage, read_json

Note = dict[str, Any]
"""The keys are `stage`, `params` (dotted keys), `ended`, `seconds`, `memory_mb` and others."""


def read_notes(root: Path) -> list[Note]:
    """Return all notes of a project, oldest first; raises ValueError if one is damaged."""
    remedy = "delete this file; it only has times"
    found: list[tuple[float, str, Note]] = []
    for path in (root / ".work/times").glob("*.json"):
        note = read_json(path, remedy=remedy)
        with explain_damage(path, remedy=remedy):
            note |= {"params": dict(note["params"]), "seconds": float(note["seconds"])}
            found.append((float(note["ended"]), str(note["stage"]), note))
    return [note for *_, note in sorted(found, key=lambda each: each[:2])]


def newest_notes(notes: Sequence[Note], flat: Mapping[str, Any]) -> dict[str, Note]:
    """Return the newest note of each stage that ran with these parameters, which are flat.

    A stage that never ran to its end in one go is missing.
    """
    own = {
        note["stage"]: note
        for note in notes
        if all(flat.get(key) == value for key, value in note["params"].items())
    }
    return dict(sorted(own.items()))
