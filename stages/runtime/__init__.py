"""Code that all stages share. Only this package uses DVC and MLflow.

`run` runs a stage, `launch` starts several processes, `work_dir` keeps unfinished work, `training`
and `tracking` record trainings in MLflow. Of the library, only `config`, `files`, `processes` and
`types` are imported. So nothing here changes a result, and no stage in dvc.yaml depends on this
package. Stages import this package before torch, because torch reads the settings below.
"""

import ctypes
import os
import sys

# How long OpenMP's threads spin before they sleep. The default slows other processes down. With
# OMP_WAIT_POLICY=PASSIVE, two threads are no faster than one on small tensors (docs/log.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# By default, glibc returns freed large buffers to the operating system, and each training step asks
# for them again. Keeping up to 2 GiB of them saves a tenth of a step's CPU time.
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    _libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
