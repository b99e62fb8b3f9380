"""SLURM: a stage that srun has started as several tasks joins them; a batch script starts srun.

In the script of a job with several nodes, a parallel stage starts itself on all nodes by srun: once
on each node, where `launch.run_several` starts the processes of this node. These launchers of torch
meet at the first node. The variable SLURM_JOB_NUM_NODES says how many nodes are used; a user can
lower it.
"""

from stages.runtime.launch import MESSAGES, RENDEZVOUS

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from contradiff.signals import Stopped

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Batch scripts and the shells of salloc have step numbers from here on, or none."""


def join_step() -> None:
    """Set torch's variables if srun has started this process as one of several tasks.

    The variables of another launcher stay as they are.
    """
    env = os.environ
    is_alone = not _in_step() or int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1
    if is_alone or "WORLD_SIZE" in env or RENDEZVOUS in env:
        return
    # With --gpus-per-task, a task sees only its own GPU, whose number is then 0.
    has_own_gpu = env.get("CUDA_VISIBLE_DEVICES", "").isdecimal()
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = "0" if has_own_gpu else env["SLURM_LOCALID"]
    env["MASTER_ADDR"], env["MASTER_PORT"] = _first_host("SLURM_STEP_NODELIST"), str(_port())


def num_nodes() -> int:
    """Return on how many nodes this process must start a parallel stage. In a step, it is 1."""
    if "WORLD_SIZE" in os.environ or _in_step() or "SLURM_JOB_ID" not in os.environ:
        return 1
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def run_on_nodes(module: str, *, nodes: int, root: Path) -> int:
    """Run `python -m module`, with this process's arguments, on all nodes; return the exit code.

    Raises ChildProcessError if a node or process has ended without a message, and `Stopped` after a
    signal, which is passed on.
    """
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    command += ["--cpu-bind=none", "--kill-on-bad-exit=1", sys.executable, "-m", module]
    endpoint = f"{_first_host('SLURM_JOB_NODELIST')}:{_port()}"
    (work := root / ".work").mkdir(exist_ok=True)
    # All nodes see this folder. So a message that several nodes have is printed once.
    with tempfile.TemporaryDirectory(dir=work, prefix="messages-") as folder:
        variables = os.environ | {RENDEZVOUS: endpoint, MESSAGES: folder}
        with subprocess.Popen([*command, *sys.argv[1:]], env=variables) as srun:
            try:
                code = srun.wait()
            except Stopped as error:
                # srun does not pass SIGINT on, but SIGTERM and SIGUSR1. After a second signal, the
                # exception leaves both blocks at once.
                is_typed = error.number == signal.SIGINT
                srun.send_signal(signal.SIGTERM if is_typed else error.number)
                srun.wait()
                if not any(Path(folder).iterdir()):
                    raise
                return 128 + error.number
        if code and not any(Path(folder).iterdir()):
            what = f"srun ended with code {code}, because a node or a process was lost"
            raise ChildProcessError(f"{what}; run the same command to go on")
    return code


def _in_step() -> bool:
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _first_host(variable: str) -> str:
    command = ["scontrol", "show", "hostnames", os.environ[variable]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise ValueError(f"{variable}={os.environ[variable]}: {done.stderr.strip()}")
    return done.stdout.split()[0]


def _port() -> int:
    """Return a port that depends on the job, below those that Linux gives to clients."""
    return 10_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000
