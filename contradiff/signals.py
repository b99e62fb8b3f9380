"""Signals that stop a program: Ctrl-C, SIGTERM, and SIGUSR1, SLURM's warning of a job's end.

A training finishes its step and saves its state before it stops. All other work stops at once.
"""

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SECONDS_OF_ONE_SIGNAL = 1.0
"""Signals within this time count as one: `timeout` and launchers send the same signal twice."""


class Stopped(KeyboardInterrupt):
    """A signal ends the program. The text says how to go on, and what a training has `saved`."""

    def __init__(self, number: int, *, saved: str = "") -> None:
        super().__init__(f"{saved or 'interrupted'}; run the same command to go on")
        self.number, self.saved = number, saved


def stop_at_once() -> None:
    """Let the signals `STOPPING` raise `Stopped`, except those that the parent process ignores."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def outlive_signals(_worker: int) -> None:
    """Let a worker that loads data serve the step in hand. The main process ends the worker.

    Signals often reach all processes of a group. SIGTERM ends the worker a minute later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


@contextmanager
def postpone_signals() -> Generator[Callable[[], int]]:
    """Note a signal during the block. The yielded function returns the signal's number, or 0.

    A second signal raises `Stopped` at once. The end of the block raises `Stopped` too if a signal
    was noted. Python has signal handlers only in the main thread; elsewhere, nothing changes.
    """
    noted, noted_at = 0, 0.0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal noted, noted_at
        if not noted:
            noted, noted_at = number, time.monotonic()
        elif time.monotonic() - noted_at > SECONDS_OF_ONE_SIGNAL:
            raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    earlier = {number: signal.getsignal(number) for number in STOPPING}
    earlier = {number: action for number, action in earlier.items() if action != signal.SIG_IGN}
    for number in earlier:
        signal.signal(number, note)
    try:
        yield lambda: noted
    finally:
        for number, action in earlier.items():
            signal.signal(number, action)
    if noted:
        raise Stopped(noted)
