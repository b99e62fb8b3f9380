"""How many processes run a stage, and how they are started.

A stage that can be shared starts itself on every GPU of the machine: `python -m stages.pretrain`
becomes `torchrun ... -m stages.pretrain`. The number stands neither in dvc.yaml nor in dvc.lock;
the batch size of params.yaml is the global one. A stage that somebody else's torchrun or
`accelerate launch` has started just joins the others.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "CONTRADIFF_NUM_PROCESSES"
# what a driver for NVIDIA, AMD or WSL shows; without one, torch need not be loaded to count to zero
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def num_processes() -> int:
    """Return how many processes to start: the variable's, or else the number of CUDA devices.

    Raises:
        ValueError: CONTRADIFF_NUM_PROCESSES is not an integer of at least 1.
    """
    text = os.environ.get(VARIABLE, "")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{VARIABLE}={text}: must be an integer of at least 1")
        return int(text)
    if not any(Path(driver).exists() for driver in _DRIVERS):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def command(stage: str, arguments: Sequence[str], *, count: int) -> list[str]:
    """Return the command line that runs a stage in `count` processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [sys.executable, *torchrun, "-m", f"stages.{stage}", *arguments]


def start_several(stage: str) -> None:
    """Become torchrun if several processes are asked for and none has been started yet.

    Raises:
        ValueError: CONTRADIFF_NUM_PROCESSES is not an integer of at least 1.
    """
    if "WORLD_SIZE" in os.environ:
        return
    count = num_processes()
    if count > 1:
        line = command(stage, sys.argv[1:], count=count)
        os.execv(line[0], line)  # noqa: S606  # the same process, so that signals reach the stage
