"""Independent jobs in processes of their own, which end when they are told, or left alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import TypeVar

SECONDS_BETWEEN_REPORTS = 0.5

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


class _Shared:
    """What a worker process shares with the one that started it."""

    stop: Event
    num_steps: "Synchronized[int]"


class _StoppedError(Exception):
    """Another job has failed, or the run is interrupted."""


def run_jobs(
    work: Callable[..., ResultT],
    jobs: Sequence[JobT],
    *,
    num_workers: int,
    on_progress: Callable[[int], None],
) -> Generator[tuple[JobT, ResultT]]:
    """Yield each job with its result, as they get done.

    When a job fails, or the generator is closed, the others end at their next step.

    Args:
        work: what is done: picklable, called with a job and `tick`, which it calls at every step
            and whose errors it lets pass.
        jobs: in the order in which they are begun.
        num_workers: processes; 0: all is done in this one.
        on_progress: told how many steps were made since it was called last.

    Raises:
        ChildProcessError: a worker process was killed.
    """
    if num_workers == 0:
        for job in jobs:
            yield job, work(job, tick=lambda: on_progress(1))
    elif jobs:
        yield from _in_processes(work, jobs, min(num_workers, len(jobs)), on_progress)


def _in_processes(
    work: Callable[..., ResultT],
    jobs: Sequence[JobT],
    num_workers: int,
    on_progress: Callable[[int], None],
) -> Generator[tuple[JobT, ResultT]]:
    # Forking a process that has threads (torch's, OpenMP's) can hang: start anew.
    context = multiprocessing.get_context("spawn")
    stop, num_steps = context.Event(), context.Value("q", 0)
    told = 0
    pool = ProcessPoolExecutor(
        num_workers, context, initializer=_start_worker, initargs=(stop, num_steps)
    )
    try:
        job_of: dict[Future[ResultT], JobT] = {pool.submit(_do, work, job): job for job in jobs}
        waiting = set(job_of)
        while waiting:
            ready, waiting = wait(waiting, SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
            now = num_steps.value
            on_progress(now - told)
            told = now
            for future in ready:
                yield job_of[future], future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed, perhaps for want of memory: lower runtime.num_workers, "
            "then run the same command again; what is whole is kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _do(work: Callable[..., ResultT], job: object) -> ResultT:
    return work(job, tick=_tick)


def _tick() -> None:
    with _Shared.num_steps.get_lock():
        _Shared.num_steps.value += 1
    if _Shared.stop.is_set():
        raise _StoppedError


def _start_worker(stop: Event, num_steps: "Synchronized[int]") -> None:
    _Shared.stop, _Shared.num_steps = stop, num_steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears it too, and tells
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
