"""Everything is made once: by several processes, after a kill, and when a file has gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from contradiff.data.map_shards import Made, Processes, Tick, map_shards, missing_items
from contradiff.data.shards import write_shard
from contradiff.processes import Part, PartFinished

ITEMS = list(range(7))


def name_of(item: int) -> str:
    return f"shard-{item}"


class Maker:
    """Writes a shard of `item + 1` samples; counts what it is asked for and can be made to fail."""

    def __init__(self, folder: Path, *, faults: dict[int, BaseException] | None = None) -> None:
        self.folder, self.faults, self.asked = folder, faults or {}, []

    def __call__(self, item: int, tick: Tick) -> Made:
        self.asked.append(item)
        if item in self.faults:
            raise self.faults[item]
        records = [{"__key__": b"%d" % number, "cls": b"%d" % item} for number in range(item + 1)]
        shard = write_shard(self.folder / f"{name_of(item)}.tar", records, compression="none")
        for _ in records:
            tick(1)
        return Made((shard,), {"twice": 2 * item})

    def map(self, **settings: object) -> list[Made]:
        return map_shards(ITEMS, self, self.folder, name_of=name_of, **settings)


def test_all_is_made_in_order_with_its_notes(tmp_path: Path):
    told: list[int] = []
    made = Maker(tmp_path).map(on_progress=told.append)
    assert [item.files[0].num_samples for item in made] == [1, 2, 3, 4, 5, 6, 7]
    assert [item.notes for item in made] == [{"twice": 2 * item} for item in ITEMS]
    assert sum(told) == 28
    assert map_shards([], Maker(tmp_path), tmp_path, name_of=name_of, num_workers=2) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), ValueError(), OSError("unreadable")])
def test_what_is_whole_is_not_made_again(tmp_path: Path, fault: BaseException):
    with pytest.raises(type(fault)):
        Maker(tmp_path, faults={3: fault}).map()
    assert missing_items(ITEMS, tmp_path, name_of=name_of) == [3, 4, 5, 6]
    again, told = Maker(tmp_path), []
    assert again.map(on_progress=told.append) == Maker(tmp_path / "new").map()
    assert again.asked == [3, 4, 5, 6]
    assert sum(told) == 4 + 5 + 6 + 7


def test_a_moved_or_shortened_file_is_made_again(tmp_path: Path):
    made = Maker(tmp_path).map()
    (tmp_path / "shard-2.tar").unlink()
    (tmp_path / "shard-4.tar").write_bytes(b"half a shard")
    (tmp_path / "shard-5.json").unlink()
    again = Maker(tmp_path)
    assert (again.map(), again.asked) == (made, [2, 4, 5])


def in_threads(size: int, work: Callable[[Processes], object]) -> list[object]:
    """Threads stand in for processes: all that these share is a folder and a barrier."""
    barrier, results = threading.Barrier(size, timeout=30), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Processes(rank, size, barrier.wait))
        except BaseException as error:  # noqa: BLE001
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [2, 3, 9])
def test_processes_share_the_work_and_one_shows_the_progress_of_all(tmp_path: Path, size: int):
    makers = [Maker(tmp_path) for _ in range(size)]
    told: list[list[int]] = [[] for _ in range(size)]
    (tmp_path / "done-1").write_text("1000")  # by an earlier run, which was killed
    made = in_threads(
        size, lambda own: makers[own.rank].map(processes=own, on_progress=told[own.rank].append)
    )
    assert made == [Maker(tmp_path / "alone").map()] * size
    assert sorted(item for maker in makers for item in maker.asked) == ITEMS
    assert max(len(maker.asked) for maker in makers) == -(-len(ITEMS) // size)
    assert sum(told[0]) == 28
    assert not any(told[1:])
    assert min(told[0]) >= 0


def test_parts_make_everything_once_and_a_whole_run_finds_it(tmp_path: Path):
    makers = [Maker(tmp_path) for _ in range(4)]
    for number, maker in enumerate(makers[:3], start=1):
        (tmp_path / f"failed-{number}-of-3-1").touch()  # by an earlier run of this part
        told: list[int] = []
        part = Processes(part=Part(number, 3))
        with pytest.raises(PartFinished):
            maker.map(processes=part, on_progress=told.append)
        assert sum(told) == sum(item + 1 for item in maker.asked)
    assert [maker.asked for maker in makers] == [[0, 3, 6], [1, 4], [2, 5], []]
    assert makers[3].map() == Maker(tmp_path / "alone").map()
    assert makers[3].asked == []


def test_a_part_is_shared_by_processes(tmp_path: Path):
    makers = [Maker(tmp_path) for _ in range(2)]

    def work(own: Processes) -> None:
        part = replace(own, part=Part(1, 2))
        with pytest.raises(PartFinished):
            makers[own.rank].map(processes=part)

    assert in_threads(2, work) == [None, None]
    assert [maker.asked for maker in makers] == [[0, 4], [2, 6]]


@pytest.mark.parametrize("text", ["0/16", "17/16", "x", "1", "/", "1/0", "-1/2", "1.5/2", "1/2/3"])
def test_only_parts_are_parts(text: str):
    assert str(Part.parse("16/16")) == "16-of-16"
    with pytest.raises(ValueError, match=f"'{text}' is no part; the sixteen parts"):
        Part.parse(text)


def test_processes_wait_for_a_file_that_was_moved(tmp_path: Path):
    """Its old note is there; the process that makes it again is slower than the others."""
    Maker(tmp_path).map()
    for item in (0, 1):
        (tmp_path / f"shard-{item}.tar").unlink()

    def make(item: int, tick: Tick) -> Made:
        time.sleep(0.5 * item)
        return Maker(tmp_path)(item, tick)

    made = in_threads(
        2, lambda own: map_shards(ITEMS, make, tmp_path, name_of=name_of, processes=own)
    )
    assert made[0] == made[1] == Maker(tmp_path / "alone").map()


@pytest.mark.parametrize("fault", [ValueError("bad"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failing_process_ends_the_others(tmp_path: Path, fault: BaseException):
    faults = {1: fault}
    results = in_threads(2, lambda own: Maker(tmp_path, faults=faults).map(processes=own))
    assert results[1] is fault
    assert isinstance(results[0], ChildProcessError)
    assert "process 1 has failed" in str(results[0])
    # a new run does not take up the old failure, and what is whole is kept
    assert missing_items(ITEMS, tmp_path, name_of=name_of) == [1, 3, 5]
    results = in_threads(2, lambda own: Maker(tmp_path).map(processes=own))
    assert results[0] == results[1] == Maker(tmp_path / "alone").map()


def test_another_run_may_end_while_the_main_process_waits_for_it(tmp_path: Path):
    """The first barrier is passed when the folder's lock is held: what is missing is seen then."""
    maker = Maker(tmp_path)
    maker.map(processes=Processes(1, 2, lambda: Maker(tmp_path).map()))
    assert maker.asked == []


JOBS = """
import os, signal, sys, time
from pathlib import Path
from contradiff.data.map_shards import Made, map_shards

class Make:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, item, tick):
        (self.folder / f"{item}.pid").write_text(str(os.getpid()))
        if item == 1 and (self.folder / "kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 1 and (self.folder / "fail").exists():
            while not (self.folder / "0.pid").exists():
                time.sleep(0.01)
            raise ValueError("data.root: no such luck")
        time.sleep(60 if item == 0 and not (self.folder / "quick").exists() else 0.05)
        return Made((), {"item": item})

def name_of(item):
    return f"shard-{item}"

if __name__ == "__main__":
    folder, told = Path(sys.argv[1]), []
    try:
        made = map_shards(range(4), Make(folder), folder, name_of=name_of, num_workers=2,
                          size_of=lambda item: 10 * item, on_progress=told.append)
        print([item.notes["item"] for item in made], sum(told))
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start four items in two workers; unless told otherwise, item 0 would take a minute."""
    script = tmp_path / "jobs.py"
    script.write_text(JOBS)

    def run(what: str) -> subprocess.Popen[str]:
        (tmp_path / what).touch()
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )

    return run


KILLED = (
    "ChildProcessError: a worker process was killed, perhaps because memory ran out: lower "
    "runtime.num_workers and run the same command again (finished shards are kept)"
)


@pytest.mark.parametrize(
    ("what", "output"),
    [
        ("quick", r"[0, 1, 2, 3] 60"),
        ("fail", "ValueError: data.root: no such luck"),
        ("kill", KILLED),
    ],
)
def test_workers_make_all_or_end_together(
    start: Callable[[str], subprocess.Popen[str]], what: str, output: str
):
    assert start(what).communicate(timeout=60) == (f"{output}\n", "")


def is_alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("30 seconds have passed")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_one_that_started_them(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path, how: signal.Signals
):
    process = start("wait")
    wait_for((tmp_path / "shard-3.json").exists)
    workers = {int(path.read_text()) for path in tmp_path.glob("*.pid")}
    assert process.pid not in workers
    process.send_signal(how)
    process.communicate(timeout=30)
    wait_for(lambda: not any(map(is_alive, workers)))
