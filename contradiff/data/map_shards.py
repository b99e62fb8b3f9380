"""One resumable loop over shards, for every stage that writes them; processes can share it.

For each item (a planned or an existing shard), `make` writes files to a work folder. A note beside
the files then says that they are whole, so that a resumed stage skips the item.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from contradiff.data.shard_info import ShardInfo
from contradiff.data.shards import Shard, ShardIndex
from contradiff.files import explain_full_disk, replace_file
from contradiff.processes import Processes

STATE_VERSION = 1
"""Raise it when finished shards of an interrupted run may no longer be mixed with new ones."""
SECONDS_BETWEEN_LOOKS = 0.2

Item = TypeVar("Item")
Tick = Callable[[int], None]
"""Told how many more samples are done."""


@dataclass(frozen=True)
class Made:
    """The result of one item: files in the work folder, and further notes as JSON."""

    files: tuple[Shard, ...]
    notes: dict[str, Any] = field(default_factory=dict[str, Any])


def _ignore(_: int) -> None: ...


def map_shards(
    items: Sequence[Item],
    make: Callable[[Item, Tick], Made],
    work_dir: Path,
    *,
    name_of: Callable[[Item], str],
    processes: Processes | None = None,
    num_workers: int = 0,
    size_of: Callable[[Item], int] = lambda _: 1,
    on_progress: Tick = _ignore,
) -> list[Made]:
    """Call `make` for every item that an interrupted run has not finished yet.

    `make` writes an item's files to `work_dir`, each whole or not at all, and tells its second
    argument how many samples are done. `<name_of(item)>.json` is an item's note.

    Each of n processes takes every n-th of the missing items. It then waits for the others by
    looking at files: a collective operation would have a time limit. Or `num_workers` further
    processes on this machine run `make`, which must then be picklable; `size_of` says how many
    samples are done with an item. `on_progress` gets the new samples of all, in process 0.

    Every process returns the results in the order of `items`. A ChildProcessError says that another
    process failed or that a worker was killed, a ValueError that the disk is full.
    """
    processes = processes or Processes()
    processes.barrier()  # process 0 holds the folder's lock now: no other run writes to it
    missing = missing_items(items, work_dir, name_of=name_of)
    crew = _Crew(work_dir, processes, on_progress)
    processes.barrier()  # everyone has looked for what is missing before anyone writes
    own = missing[processes.rank :: processes.size]
    try:
        with explain_full_disk(work_dir):
            results = ((item, make(item, crew.advance)) for item in own)
            if num_workers and own:
                results = _in_workers(make, own, num_workers, size_of, crew.advance)
            for item, made in results:
                crew.tell()  # before the note: whoever has seen all notes has seen all progress
                with replace_file(work_dir / f"{name_of(item)}.json") as path:
                    path.write_text(json.dumps(asdict(made)), encoding="utf-8")
            crew.wait(lambda: not missing_items(items, work_dir, name_of=name_of))
    except BaseException:  # torchrun tells the others of a process that was killed
        with suppress(OSError):  # the disk may be full: the first error says so
            crew.file("failed", processes.rank).touch()
        raise
    notes = (_read_note(work_dir / f"{name_of(item)}.json") for item in items)
    found = [made for made in notes if made is not None]
    assert len(found) == len(items), "a note says what is there"
    processes.barrier()  # everyone has read the notes before anyone moves the files
    return found


def missing_items(
    items: Sequence[Item], work_dir: Path, *, name_of: Callable[[Item], str]
) -> list[Item]:
    """Return the items that `map_shards` has not finished: those without a valid note."""
    return [item for item in items if _read_note(work_dir / f"{name_of(item)}.json") is None]


def publish_shards(
    folder: Path, work_dir: Path, made: Iterable[tuple[str, Made]], info: ShardInfo
) -> None:
    """Move finished shards to an empty folder and write its index, which says `info` of them.

    `made` holds the split and the result of each item. A ValueError says that the disk is full.
    """
    splits: dict[str, tuple[Shard, ...]] = {}
    for split, item in made:
        splits[split] = (*splits.get(split, ()), *item.files)
    with explain_full_disk(folder.parent):
        # The index first: on a full disk it is what fails, and the shards are still in their place.
        ShardIndex(splits, info).write(folder)
        for shard in chain(*splits.values()):
            shutil.move(work_dir / shard.name, folder / shard.name)


def _read_note(note: Path) -> Made | None:
    """Read an item's note; None if there is no note, or if a file differs from what it says."""
    if not note.is_file():
        return None
    content = json.loads(note.read_text(encoding="utf-8"))
    files = tuple(Shard(**shard) for shard in content["files"])
    for file in files:
        path = note.parent / file.name
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            return None
    return Made(files, content["notes"])


class _Crew:
    """Files by which the processes tell each other how far they are, and that one has failed."""

    def __init__(self, folder: Path, processes: Processes, on_progress: Tick) -> None:
        self.folder, self.processes, self.on_progress = folder, processes, on_progress
        self.done, self.shown, self.told_at = 0, 0, -math.inf
        for what in ("failed", "done"):  # by an earlier run
            self.file(what, processes.rank).unlink(missing_ok=True)

    def file(self, what: str, rank: int) -> Path:
        return self.folder / f"{what}-{rank}"

    def advance(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.told_at >= SECONDS_BETWEEN_LOOKS:
            self.tell()

    def wait(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            for rank in range(self.processes.size):
                if self.file("failed", rank).exists():
                    raise ChildProcessError(f"process {rank} has failed; its own message says why")
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.tell()
        self.tell()

    def tell(self) -> None:
        self.told_at = time.monotonic()
        if self.processes.rank > 0:
            with replace_file(self.file("done", self.processes.rank)) as path:
                path.write_text(str(self.done))
            return
        files = [self.file("done", rank) for rank in range(1, self.processes.size)]
        total = self.done + sum(int(file.read_text()) for file in files if file.is_file())
        self.on_progress(total - self.shown)
        self.shown = total


def _in_workers(
    make: Callable[[Item, Tick], Made],
    items: Sequence[Item],
    num_workers: int,
    size_of: Callable[[Item], int],
    tick: Tick,
) -> Iterator[tuple[Item, Made]]:
    """Yield items as workers finish them; a failure ends all workers at once."""
    others = set(multiprocessing.active_children())
    # Forking a process that has threads (torch's, OpenMP's) can hang: start anew.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(items)), context, initializer=_start_worker)
    try:
        waiting = {pool.submit(make, item, _ignore): item for item in items}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                item = waiting.pop(future)
                made = future.result()
                tick(size_of(item))
                yield item, made
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            what = "a worker process was killed, perhaps for want of memory: lower "
            remedy = "runtime.num_workers, then run the same command again; what is whole is kept"
            raise ChildProcessError(what + remedy) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears it too
    threading.Thread(target=end_with_parent, daemon=True).start()
