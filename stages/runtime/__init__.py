"""Code that all stages share. Only this package uses DVC and MLflow.

`run` runs a stage, `launch` starts several processes, `work_dir` keeps unfinished work, `training`
and `tracking` record trainings in MLflow. No code here changes a result, so no stage in dvc.yaml
depends on this package. Stages import this package first, because the settings below must be made
before torch is loaded.
"""

import ctypes
import os
import sys
import time

STARTED = time.perf_counter()
"""When this process began to import the stage, in seconds of `time.perf_counter`."""

# Idle OpenMP threads loop this often before they sleep. The default slows other processes down.
# With OMP_WAIT_POLICY=PASSIVE, two threads are no faster than one on small tensors (docs/log.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Keep up to 2 GiB of freed memory in the process. By default, glibc returns large buffers to the
# operating system after each use, which costs a tenth of a training step's CPU time.
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    _libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
