"""Start a stage on all GPUs: `python -m stages.runtime.launch stages.pretrain [arguments]`.

One process runs as `python -m stages.pretrain`; several are started by torchrun. How many there are
comes from CONTRADIFF_NUM_PROCESSES or else the number of CUDA devices, so that it stands neither in
dvc.yaml nor in dvc.lock: the batch size of params.yaml is the global one, over all processes.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "CONTRADIFF_NUM_PROCESSES"
# what a driver for NVIDIA, AMD or WSL shows; without one, torch need not be loaded to count to zero
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def num_processes() -> int:
    """Return how many processes to start.

    Raises:
        ValueError: CONTRADIFF_NUM_PROCESSES is no integer of at least 1.
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


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs a module with its arguments.

    Raises:
        ValueError: no module of `stages` is named first, or the number of processes is wrong.
    """
    module = arguments[0] if arguments else ""
    if not module.startswith("stages.") or importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{module!r} is no stage; usage: python -m stages.runtime.launch stages.pretrain "
            "[arguments]"
        )
    count = num_processes()
    if count == 1:
        return [sys.executable, "-m", *arguments]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [sys.executable, *torchrun, "-m", *arguments]


if __name__ == "__main__":
    try:
        line = command(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"contradiff: launch: {error}")
    os.execv(line[0], line)  # noqa: S606  # the same process, so that signals reach the stage
