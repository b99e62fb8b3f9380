"""A resumable loop over shards, for all stages that write shards. Processes can share the loop.

An item stands for one shard: a planned shard, or an existing shard to read. For each item, the
function `make` writes files to a work folder. Then the loop writes a note to the same folder: a
JSON file that lists the item's complete files. A resumed stage skips items that have a note.
"""

import json
import math
import multiprocessing
import os
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

from pydantic import TypeAdapter, ValidationError

from contradiff.data.shard_info import ShardInfo
from contradiff.data.shards import Shard, ShardIndex
from contradiff.files import link_or_copy, replace_file
from contradiff.processes import PartFinished, Processes

STATE_VERSION = 2
"""Increase this number if new code must not continue the shards of an interrupted run."""
SECONDS_BETWEEN_LOOKS = 0.2

Item = TypeVar("Item")
Tick = Callable[[int], None]
"""A function that is called with the number of newly finished samples."""


@dataclass(frozen=True)
class Made:
    """What `make` returns for one item: the written files, and other results as JSON (`notes`)."""

    files: tuple[Shard, ...]
    notes: dict[str, Any] = field(default_factory=dict[str, Any])


_NOTE = TypeAdapter(Made)


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
    """Call `make` for each item that has no note yet. Return the results of all items, in order.

    `make(item, tick)` writes files to `work_dir`, each completely or not at all. It calls `tick`
    with the number of newly finished samples. The item's note is `<name_of(item)>.json`.

    Each of n processes makes every n-th missing item, and then waits until all items have notes.
    If `num_workers` > 0, that many worker processes call `make`, which must be picklable. In a
    worker, `tick` does nothing, so `size_of` must give the number of samples of an item. Process 0
    calls `on_progress` with the number of newly finished samples of all processes.

    With `processes.part`, only the items of this part count. When they are finished, PartFinished
    is raised.

    Raises ChildProcessError if another process failed or a worker was killed, and ValueError if
    the disk is full.
    """
    processes = processes or Processes()
    items = processes.share(items)
    processes.barrier()  # now process 0 has locked the folder: no other run writes to it
    missing = missing_items(items, work_dir, name_of=name_of)
    crew = _Crew(work_dir, processes, on_progress)
    processes.barrier()  # every process lists missing items before any process writes
    own = missing[processes.rank :: processes.size]
    try:
        results = ((item, make(item, crew.advance)) for item in own)
        if num_workers and own:
            results = _in_workers(make, own, num_workers, size_of, crew.advance)
        for item, made in results:
            crew.tell()  # first: when all notes exist, all progress must be known
            with replace_file(work_dir / f"{name_of(item)}.json") as path:
                path.write_text(json.dumps(asdict(made)), encoding="utf-8")
        crew.wait(lambda: not missing_items(items, work_dir, name_of=name_of))
    except BaseException:  # a killed process cannot write the file; torchrun ends the others
        with suppress(OSError):  # on a full disk this fails too; the first error counts
            crew.file("failed", processes.rank).touch()
        raise
    notes = (_read_note(work_dir / f"{name_of(item)}.json") for item in items)
    found = [made for made in notes if made is not None]
    assert len(found) == len(items), "every item must have a note"
    processes.barrier()  # every process reads the notes before any process moves files
    if processes.part is not None:
        raise PartFinished
    return found


def missing_items(
    items: Sequence[Item], work_dir: Path, *, name_of: Callable[[Item], str]
) -> list[Item]:
    """Return the items without a valid note, which `map_shards` has not finished."""
    return [item for item in items if _read_note(work_dir / f"{name_of(item)}.json") is None]


def publish_shards(
    folder: Path, work_dir: Path, made: Iterable[tuple[str, Made]], info: ShardInfo
) -> None:
    """Link or copy finished shards from `work_dir` to the empty `folder`, and write their index.

    `made` has the split and the result of each item. The index contains `info`. The shards stay in
    `work_dir`, so that nothing is lost if the process is killed before `folder` is complete.
    """
    splits: dict[str, list[Shard]] = {}
    for split, item in made:
        splits.setdefault(split, []).extend(item.files)
    for shard in chain(*splits.values()):
        link_or_copy(work_dir / shard.name, folder / shard.name)
    ShardIndex({split: tuple(shards) for split, shards in splits.items()}, info).write(folder)


def _read_note(note: Path) -> Made | None:
    """Read a note. Return None if it is missing or damaged, or a file in it is not complete."""
    try:
        made = _NOTE.validate_json(note.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    for file in made.files:
        path = note.parent / file.name
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            return None
    return made


class _Crew:
    """Small files by which the processes tell each other their progress and their failures."""

    def __init__(self, folder: Path, processes: Processes, on_progress: Tick) -> None:
        self.folder, self.processes, self.on_progress = folder, processes, on_progress
        self.done, self.shown, self.told_at = 0, 0, -math.inf
        for what in ("failed", "done"):  # left by an earlier run
            self.file(what, processes.rank).unlink(missing_ok=True)

    def file(self, what: str, rank: int) -> Path:
        part = "" if self.processes.part is None else f"{self.processes.part}-"
        return self.folder / f"{what}-{part}{rank}"

    def advance(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.told_at >= SECONDS_BETWEEN_LOOKS:
            self.tell()

    def wait(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            for rank in range(self.processes.size):
                if self.file("failed", rank).exists():
                    raise ChildProcessError(f"process {rank} has failed; see its own message")
            time.sleep(SECONDS_BETWEEN_LOOKS)  # waiting with torch would have a time limit
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
    """Yield items as soon as a worker has finished them. If an item fails, end all workers."""
    others = set(multiprocessing.active_children())
    # Forking a process that has threads (torch's, OpenMP's) can hang: start new interpreters.
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
            what = "a worker process was killed, perhaps because memory ran out: lower "
            remedy = "runtime.num_workers and run the same command again (finished shards are kept)"
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

    for number in (signal.SIGINT, signal.SIGUSR1):  # the main process handles them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
