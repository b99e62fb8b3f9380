"""The stages of the pipeline: `python -m stages.NAME` runs one."""

import atexit
import gc
import os
import sys

has_succeeded = False
"""Set by `run.execute`: all work is done, and the exit code is 0."""


def _leave_at_once() -> None:
    """End a successful process without freeing what it imported, which takes up to 1.5 seconds.

    Python has called the exit functions that were registered later; earlier ones are not called.
    """
    if has_succeeded:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # a closed one is None
                stream.flush()
        os._exit(0)


# Python sets argv[0] to "-m" while `python -m stages.NAME` imports this package.
if sys.argv[:1] == ["-m"]:
    atexit.register(_leave_at_once)
    # The imports that follow make no garbage, and the search for it takes a fifth of their time.
    gc.disable()
