"""Starts several processes that share one stage, and waits for them.

A parallel stage starts one process for each GPU of the machine. Without a GPU, the longest stages
start two processes that share the cores, since two processes are faster than two threads. The
number of processes changes no result, because a batch size in params.yaml counts the images of all
processes together. If torchrun or `accelerate launch` has started the stage, the stage starts no
further processes. `slurm` starts this launcher on several nodes.
"""

import hashlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from contradiff.signals import Stopped

VARIABLE = "CONTRADIFF_NUM_PROCESSES"
MESSAGES = "CONTRADIFF_MESSAGES"
"""Environment variable: a folder in which processes note the messages that are printed."""
RENDEZVOUS = "CONTRADIFF_RENDEZVOUS"
"""Environment variable: host and port where the launchers of several nodes meet."""


def num_processes(*, without_gpu: int = 1) -> int:
    """Return how many processes to start; 1 if torchrun or Accelerate has started this process.

    `without_gpu` is the number for a machine without a GPU, if it has as many cores, and if
    OMP_NUM_THREADS does not say that the cores are shared already.
    """
    if "WORLD_SIZE" in os.environ:
        return 1
    if text := os.environ.get(VARIABLE, ""):
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{VARIABLE}={text}: must be an integer of at least 1")
        return int(text)
    on_cpu = 1 if os.environ.get("OMP_NUM_THREADS") else min(without_gpu, num_cores())
    # Without a device file of NVIDIA, AMD or WSL there is no GPU. Then skip the slow torch import.
    if not any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg")):
        return on_cpu
    import torch

    return torch.cuda.device_count() or on_cpu


def num_cores() -> int:
    """Return how many cores this process may use."""
    has_limit = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_limit else os.cpu_count() or 1


def run_several(module: str, *, count: int) -> int:
    """Run `python -m module`, with this process's arguments, in `count` processes; wait for them.

    If srun has started this launcher on several nodes, each of them starts `count` processes.

    Returns 0, or the exit code of a process that failed. If a signal ends this process and another
    process has said so, the code is 128 + the signal's number. Otherwise raises `Stopped`. Raises
    ChildProcessError if a process was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each process prints its own errors. torch's report of 30 lines would hide these messages.
    logging.disable()
    # With more threads than cores, the processes would slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // count)))
    nodes, endpoint, rendezvous = 1, "localhost:0", {}
    if is_one_of_several_launchers():
        nodes, endpoint = int(os.environ["SLURM_STEP_NUM_TASKS"]), os.environ[RENDEZVOUS]
        rendezvous = {"is_host": os.environ["SLURM_PROCID"] == "0"}
    config = LaunchConfig(
        nodes,
        nodes,
        count,
        run_id=module,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs=rendezvous,
        max_restarts=0,
        signals_to_handle="SIGINT,SIGTERM,SIGUSR1,SIGHUP,SIGQUIT",
    )
    with tempfile.TemporaryDirectory() as own_folder:
        folder = os.environ.setdefault(MESSAGES, own_folder)  # `slurm` may have set it
        try:
            elastic_launch(config, sys.executable)("-m", module, *sys.argv[1:])
        except SignalException as error:
            if not any(Path(folder).iterdir()):
                raise Stopped(error.sigval) from None
            return 128 + error.sigval
        except ChildFailedError as error:
            # If a process is killed, others fail because they miss it. The launcher sends SIGTERM.
            killed = (
                (rank, failure)
                for rank, failure in error.failures.items()
                if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
            )
            rank, failure = next(killed, error.get_first_failure())
            if failure.exitcode >= 0:
                return failure.exitcode
            what = f"process {rank} was killed by {signal.Signals(-failure.exitcode).name}"
            raise ChildProcessError(f"{what}, perhaps because memory ran out") from None
        finally:
            if folder == own_folder:
                del os.environ[MESSAGES]
    return 0


def is_one_of_several_launchers() -> bool:
    """Return whether this process only starts others, as one of the launchers of several nodes."""
    return RENDEZVOUS in os.environ and "WORLD_SIZE" not in os.environ


def is_started_here() -> bool:
    """Return whether `run_several` has started this process. Only it knows why a signal came."""
    return MESSAGES in os.environ


def end_with_launcher() -> None:
    """Send SIGTERM to this process as soon as torch's launcher, which has started it, is killed.

    Otherwise the process would go on, and nobody would wait for it. The other processes end too: a
    training agrees on a signal, and saves its state.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def is_new_message(text: str) -> bool:
    """Return whether no other process of this stage has printed the same message."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        if folder := os.environ.get(MESSAGES):
            Path(folder, digest).touch(exist_ok=False)
        elif is_joined():  # another launcher has started this process
            from torch.distributed.distributed_c10d import (
                _get_default_store,  # pyright: ignore[reportPrivateUsage]
            )

            return _get_default_store().add(digest, 1) == 1
    except FileExistsError:
        return False
    except RuntimeError:  # process 0, which has the store, has ended with a message
        return False
    return True


def is_joined() -> bool:
    """Return whether torch.distributed has connected this process with others."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
