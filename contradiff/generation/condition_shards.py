"""Writes the shards of the validation images that image-conditional generation needs."""

from collections.abc import Callable, Iterable
from pathlib import Path

from contradiff.data.shard_info import ConditionInfo
from contradiff.data.shards import Record, ShardIndex, ShardParams, write_split

SPLIT = "condition"


def write_conditions(
    folder: Path,
    records: Iterable[Record],
    *,
    params: ShardParams,
    on_progress: Callable[[int], None],
) -> None:
    """Store images, as `condition_images.condition_records` yields them, and an index.

    There may be no images.
    """
    size = params.model_dump()
    written = write_split(folder, SPLIT, records, **size, on_progress=on_progress)
    ShardIndex({SPLIT: written}, ConditionInfo()).write(folder)
