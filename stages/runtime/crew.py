"""The processes of one stage share its work through files: who does what, how far all of them are.

No process waits in a collective while others work: the main one shows how far all of them are, a
failure ends the others at once, and no time limit of collectives is run into, however long a share
takes.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from contradiff.files import replace_file

SECONDS_BETWEEN_LOOKS = 0.2

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """One of several processes with a common folder.

    Attributes:
        folder: the same for all, such as `Run.work_dir`'s.
        rank: of this process, from 0.
        size: number of processes.
    """

    folder: Path
    rank: int
    size: int

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this process does of a list that all have alike: every n-th."""
        return items[self.rank :: self.size]

    def begin(self) -> None:
        """Take back what an earlier run has said; afterwards all wait for each other once."""
        self._failure(self.rank).unlink(missing_ok=True)
        self.say_done(0)

    def say_done(self, count: int) -> None:
        """Tell the others how many units this process has done since `begin`."""
        with replace_file(self._progress(self.rank)) as path:
            path.write_text(str(count))

    def count_done(self) -> int:
        """Units that all processes together have said to be done."""
        return sum(int(self._progress(rank).read_text()) for rank in range(self.size))

    @contextmanager
    def failing_together(self) -> Generator[None]:
        """If the block fails, the others' `wait` ends too.

        A process that is killed outright says nothing here: torchrun, which sees it, ends all.
        """
        try:
            yield
        except BaseException:
            self._failure(self.rank).touch()
            raise

    def wait(self, is_done: Callable[[], bool], *, on_look: Callable[[], None]) -> None:
        """Look now and then whether all is done.

        Args:
            is_done: whether it is.
            on_look: called before every look.

        Raises:
            ChildProcessError: another process has failed.
        """
        while True:
            on_look()
            if is_done():
                return
            failed = [rank for rank in range(self.size) if self._failure(rank).exists()]
            if failed:
                raise ChildProcessError(f"process {failed[0]} has failed; its own message says why")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _progress(self, rank: int) -> Path:
        return self.folder / f"done-{rank}"

    def _failure(self, rank: int) -> Path:
        return self.folder / f"failed-{rank}"
