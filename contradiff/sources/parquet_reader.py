"""Images out of parquet shards, one by one."""

import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

from contradiff.sources.listing import ImageFile

CACHED_BYTES = 256 << 20
"""Row groups kept in memory; parquet gives no less than one (100 images in Hugging Face's)."""


class ParquetReader:
    """Reads images by row; each process opens a shard when it first reads from it.

    An image costs the reading of its row group unless that is still in memory: reading in the
    order of the rows is much the fastest.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._forget()

    def __call__(self, file: ImageFile, /) -> bytes:
        """Read one image; one thread at a time."""
        import pyarrow as pa

        if self._owner != os.getpid():
            self._forget()  # pyarrow's files and threads do not survive a fork
        shown = f"{self.root / file.stored}"
        try:
            content = self._read(file.stored, file.offset)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise ValueError(
                f"data.root: {shown}: row {file.offset} cannot be read: {error}"
            ) from error
        if not content:
            raise ValueError(
                f"data.root: {shown}: row {file.offset} has no image bytes, only a path"
            )
        return content

    def _read(self, stored: str, row: int) -> bytes | None:
        from pyarrow import parquet

        if stored not in self._shards:
            shard = parquet.ParquetFile(self.root / stored, memory_map=True)
            groups = range(shard.metadata.num_row_groups)
            lengths = (shard.metadata.row_group(number).num_rows for number in groups)
            self._shards[stored] = shard, [0, *accumulate(lengths)]
        shard, starts = self._shards[stored]
        number = bisect_right(starts, row) - 1
        key = (stored, number)
        if key not in self._groups:
            table = shard.read_row_group(number, columns=["image.bytes"], use_threads=False)
            self._groups[key] = table["image"]
            self._num_bytes += table["image"].nbytes
            while self._num_bytes > CACHED_BYTES and len(self._groups) > 1:
                self._num_bytes -= self._groups.popitem(last=False)[1].nbytes
        self._groups.move_to_end(key)
        image = self._groups[key][row - starts[number]]
        return image["bytes"].as_py() if image.is_valid else None

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._shards: dict[str, tuple[Any, list[int]]] = {}
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._num_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind."""
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.root = state["root"]
        self._forget()
