"""Stand-ins for srun and scontrol: each node of the job is a process on this machine."""

import os
import sys
from pathlib import Path

SRUN = """#!{python}
import os, subprocess, sys, time
arguments = sys.argv[1:]
options = dict(a[2:].split("=") for a in arguments if a.startswith("--") and "=" in a)
count = int(options["ntasks"])
assert options["nodes"] == options["ntasks"] and options["ntasks-per-node"] == "1", options
command = arguments[arguments.index({python!r}) :]
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_LOCALID": "0"}}
step["SLURM_STEP_NODELIST"] = os.environ["SLURM_JOB_NODELIST"]
tasks = [
    subprocess.Popen(command, env=os.environ | step | {{"SLURM_PROCID": str(rank)}})
    for rank in range(count)
]
codes, wait = [], 0.0
while len(codes) < count:
    codes = [code for task in tasks if (code := task.poll()) is not None]
    if any(codes):
        if wait == 0.0 or wait > 30.0:
            for task in tasks:
                task.kill() if wait else task.terminate()
        wait += 0.1
    time.sleep(0.1)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] || exit 1
echo 127.0.0.1
"""


def install(folder: Path) -> dict[str, str]:
    """Write the programs, and return the environment of a batch script of a job of two nodes."""
    folder.mkdir()
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2"}
    job["SLURM_JOB_NODELIST"] = "node[1-2]"
    return job | {"PATH": f"{folder}:{os.environ['PATH']}"}
