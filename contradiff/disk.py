"""Room on a disk: how much there is, and what to say when it will not do or has run out."""

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

SPARE_BYTES = 50_000_000
"""Left free for what else a run writes."""


def describe_bytes(num_bytes: int) -> str:
    """A size as people say it, in decimal units: "1.5 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def check_free_space(folder: Path, num_bytes: int, *, ways_out: str = "") -> None:
    """Refuse to begin writing what does not fit.

    Args:
        folder: existing; where it is to be written.
        num_bytes: what is still to be written.
        ways_out: parameters, with their dotted keys, by which less would be written.

    Raises:
        ValueError: names the folder, how much is to be freed, and what else would do.
    """
    free = shutil.disk_usage(folder).free
    lacking = num_bytes + SPARE_BYTES - free
    if num_bytes > 0 and lacking > 0:
        msg = (
            f"{folder.resolve()}: {describe_bytes(num_bytes)} are to be written and "
            f"{describe_bytes(free)} are free, of which {describe_bytes(SPARE_BYTES)} are to stay "
            f"so: free {describe_bytes(lacking)} more, or put the project on a larger disk"
        )
        raise ValueError(f"{msg}, or {ways_out}" if ways_out else msg)


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
        raise ValueError(
            f"{folder}: no space is left on the disk ({error.strerror}; "
            f"{describe_bytes(shutil.disk_usage(folder).free)} free): free some, then run the same "
            "command again; what is whole is kept and the work goes on from there"
        ) from error
