"""What to say when a disk is full, or will be."""

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

SPARE_BYTES = 50_000_000
"""Left free for what else a run writes."""


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin writing what does not fit.

    Raises:
        ValueError: names the folder and how much is to be freed.
    """
    free = shutil.disk_usage(folder).free
    lacking = num_bytes + SPARE_BYTES - free
    if num_bytes and lacking > 0:
        msg = (
            f"{folder}: {_shown(num_bytes)} are to be written and {_shown(free)} are free, of "
            f"which {_shown(SPARE_BYTES)} are to stay so: free {_shown(lacking)} more, or put the "
            "project on a larger disk"
        )
        raise ValueError(msg)


@contextmanager
def explain_full_disk(folder: Path) -> Generator[None]:
    """Say what to do where the disk of `folder` runs full inside the block.

    Raises:
        ValueError: it did.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        msg = (
            f"{folder}: no space is left on the disk ({error.strerror}; "
            f"{_shown(shutil.disk_usage(folder).free)} free): free some, then run the same command "
            "again; what is whole is kept and the work goes on from there"
        )
        raise ValueError(msg) from error


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
