"""What the shards of a run hold together, and the images that none of them could take."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from contradiff.data.shards import Shard
from contradiff.files import explain_full_disk, replace_file
from contradiff.sources.packing import DoneShard, PlannedShard, Quarantined

QUARANTINE_NAME = "quarantine.json"
NUM_SHOWN = 3
"""Of quarantined images, in messages."""


class Tally:
    """What has become of the shards so far; refuses when too many images cannot be read."""

    def __init__(self, plan: Sequence[PlannedShard], *, max_quarantined: float) -> None:
        """Expect the shards of a plan.

        Args:
            plan: of all splits.
            max_quarantined: share of a split's images that may be unreadable.
        """
        self.max_quarantined = max_quarantined
        self.names = {(planned.split, planned.name): None for planned in plan}
        self.num_images: Counter[str] = Counter()
        self.labels: dict[str, set[int]] = {}
        for planned in plan:
            self.num_images[planned.split] += len(planned.files)
            self.labels.setdefault(planned.split, set()).update(f.label for f in planned.files)
        self.done: dict[tuple[str, str], DoneShard] = {}

    def add(self, planned: PlannedShard, done: DoneShard, *, folder: Path) -> None:
        """Take up a shard.

        Raises:
            ValueError: too many images of the split are unreadable; they are listed in `folder`.
        """
        self.done[planned.split, planned.name] = done
        split, total = planned.split, self.num_images[planned.split]
        faults = self.quarantined(split)
        if len(faults) <= self.max_quarantined * total:
            return
        self.write_quarantine(folder)
        shown = "\n".join(f"  {item.path}: {item.reason}" for item in faults[:NUM_SHOWN])
        raise ValueError(
            f"ingest.max_quarantined: {len(faults)} of {total} {split} images cannot be read, more "
            f"than the share {self.max_quarantined:g} that may be left out:\n{shown}\n"
            f"those found so far are listed in {folder / QUARANTINE_NAME}; mend or remove them, or "
            "raise ingest.max_quarantined (finished shards are kept)"
        )

    def shards(self, split: str) -> tuple[Shard, ...]:
        """A split's shards, in the plan's order."""
        return tuple(done.shard for done in self._of(split) if done.shard is not None)

    def quarantined(self, split: str) -> list[Quarantined]:
        """A split's unreadable images, in the plan's order."""
        return [item for done in self._of(split) for item in done.quarantined]

    def oddities(self, split: str) -> dict[str, int]:
        """How many stored images of a split are cmyk, greyscale, ..."""
        total: Counter[str] = Counter()
        for done in self._of(split):
            total.update(done.oddities)
        return dict(sorted(total.items()))

    def facts(self, *, class_ids: Sequence[str]) -> dict[str, Any]:
        """What the index tells of all shards: how many images of each class, odd, or left out.

        Raises:
            ValueError: all images of a class are unreadable.
        """
        splits = list(self.num_images)
        return {
            "class_counts": {split: self._class_counts(split, class_ids) for split in splits},
            "oddities": {split: self.oddities(split) for split in splits},
            "num_quarantined": {split: len(self.quarantined(split)) for split in splits},
        }

    def write_quarantine(self, folder: Path) -> None:
        """Write the list of images that are left out: split => key, path and reason."""
        content = {split: [asdict(i) for i in self.quarantined(split)] for split in self.num_images}
        with explain_full_disk(folder), replace_file(folder / QUARANTINE_NAME) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")

    def _of(self, split: str) -> Iterator[DoneShard]:
        return (self.done[key] for key in self.names if key[0] == split and key in self.done)

    def _class_counts(self, split: str, class_ids: Sequence[str]) -> list[int]:
        counts = np.zeros(len(class_ids), dtype=np.int64)
        for shard in self.shards(split):
            counts[: len(shard.class_counts)] += shard.class_counts
        for label in sorted(self.labels[split]):
            if counts[label] == 0:
                raise ValueError(
                    f"data.root: all {split} images of class {class_ids[label]} are unreadable"
                )
        return counts.tolist()
